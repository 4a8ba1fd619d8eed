"""Engines: whatever samples tokens. ``base.py`` has the protocols.

A chunk's way to vLLM: ``ray.py`` -> ``pool.py`` -> ``scheduler.py`` -> ``ray.py`` -> ``vllm.py``,
call by call in CONTRIBUTING.md. Faults and restarts are in ``pool.py``.
"""
