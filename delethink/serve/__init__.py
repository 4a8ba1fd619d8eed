"""Chunked thinking behind the API of OpenAI, and as a library: ``delethink.serve.thinking``."""
