"""Rollouts and training data of tinker-cookbook; runs in an environment with it.

python tinker_peer.py < JSON, a list of jobs
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from typing import Any

import tinker
from tinker_cookbook.completers import StopCondition, TokenCompleter, TokensWithLogprobs
from tinker_cookbook.rl.data_processing import assemble_training_data, compute_advantages
from tinker_cookbook.rl.rollouts import do_group_rollout

from delethink.errors import UserError
from delethink.integrations.tinker import ThinkingDatasetBuilder


class Recorded(TokenCompleter):
    """Samples what was recorded: at most ``max_tokens`` tokens after a prompt of a trace."""

    def __init__(
        self, traces: list[list[dict[str, Any]]], max_tokens: int, drops_end: bool
    ) -> None:
        # Traces of a group share their first prompt: each call takes the next one.
        self._after: dict[tuple[int, ...], list[list[int]]] = {}
        for trace in traces:
            for chunk in trace:
                for start in range(0, len(chunk["output"]), max_tokens):
                    seen = tuple(chunk["prompt"] + chunk["output"][:start])
                    self._after.setdefault(seen, []).append(chunk["output"][start:])
        self._max_tokens, self._drops_end = max_tokens, drops_end

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        assert max_tokens is None
        ids = self._after[tuple(model_input.to_ints())].pop(0)[: self._max_tokens]
        ends = ids[-1] in stop
        if ends and self._drops_end and len(ids) > 1:
            ids = ids[:-1]
        return TokensWithLogprobs(ids, [-0.25] * len(ids), "stop" if ends else "length")


def rows(data: list[tinker.Datum]) -> list[dict[str, Any]]:
    """Return prompt and sampled tokens of each datum, as the mask tells them apart."""
    found = []
    for datum in data:
        inputs = {name: value.tolist() for name, value in datum.loss_fn_inputs.items()}
        first = inputs["mask"].index(1.0)
        ids = [datum.model_input.to_ints()[0], *inputs["target_tokens"]]
        found.append(
            {
                "prompt": ids[: first + 1],
                "output": ids[first + 1 :],
                "masks": sorted(set(inputs["mask"][first:])),
                "logprobs": sorted(set(inputs["logprobs"][first:])),
                "advantages": sorted(set(inputs["advantages"][first:])),
            }
        )
    return found


async def main(given: dict[str, Any]) -> dict[str, Any]:
    try:
        train, test = await ThinkingDatasetBuilder(**given["builder"])()
    except UserError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    completer = Recorded(given["traces"], given["builder"]["max_tokens"], given["drops_end"])
    builders = [
        pickle.loads(pickle.dumps(builder))
        for i in range(len(train))
        for builder in train.get_batch(i)
    ]
    groups = [await do_group_rollout(builder, completer) for builder in builders]
    data, places = assemble_training_data(groups, compute_advantages(groups))
    return {
        "prompts": [builder.problem.prompt for builder in builders],
        "rewards": [group.get_total_rewards() for group in groups],
        "stops": [[t.stop_reason for t in group.trajectories_G] for group in groups],
        "metrics": [[t.transitions[-1].metrics for t in g.trajectories_G] for g in groups],
        "data": rows(data),
        "places": places,
        "num_test": 0 if test is None else sum(len(test.get_batch(i)) for i in range(len(test))),
    }


if __name__ == "__main__":
    print(json.dumps([asyncio.run(main(job)) for job in json.load(sys.stdin)]))
