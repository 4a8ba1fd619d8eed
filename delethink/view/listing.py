"""Sorts, filters, searches and groups the list of traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delethink.errors import ConfigError, did_you_mean
from delethink.view.index import ListedTrace, TraceIndex
from delethink.view.search import TextSearch

_KEYS: dict[str, Callable[[ListedTrace], Any]] = {
    "step": lambda row: (row.place.isdecimal(), int(row.place) if row.place.isdecimal() else 0,
                         row.place, row.name.rpartition(":")[0],
                         int(row.name.rpartition(":")[2])),
    "problem": lambda row: (row.summary.prompt, row.summary.group),
    "reward": lambda row: (row.summary.reward is not None, row.summary.reward or 0.0),
    "stop": lambda row: row.summary.stop,
    "chunks": lambda row: row.summary.chunks,
    "length": lambda row: row.summary.length,
}  # fmt: skip
PAGE_ROWS = 100


@dataclass(frozen=True)
class ListQuery:
    """A question to the list."""

    sort: str = "step"
    descending: bool = False
    text: str = ""  # in the problem, the gold answer, the setting or the whole trace
    stop: str = ""
    reward: str = ""  # "high": at least 1; "low": less; "none": without
    group: str = ""
    offset: int = 0
    rows: int = PAGE_ROWS  # of a page

    @classmethod
    def from_parameters(cls, values: Mapping[str, str]) -> ListQuery:
        """Return the query of an address.

        Raises:
            ConfigError: a name or number is unknown.
        """
        sort, offset = values.get("sort", "step"), values.get("offset", "0")
        if sort not in _KEYS:
            raise ConfigError(f"unknown order {sort!r}.{did_you_mean(sort, _KEYS)}")
        rows = values.get("rows", str(PAGE_ROWS))
        for name, number in (("offset", offset), ("rows", rows)):
            if not number.isdecimal() or len(number) > 12:
                raise ConfigError(f"{name} must be a whole number, got {number!r:.40}")
        return cls(
            sort,
            values.get("desc") == "1",
            values.get("q", "")[:500],
            values.get("stop", ""),
            values.get("reward", ""),
            values.get("group", ""),
            int(offset),
            max(1, min(PAGE_ROWS, int(rows))),
        )


def matching_rows(
    index: TraceIndex, query: ListQuery, search: TextSearch
) -> tuple[list[ListedTrace], str]:
    """Return the rows of a query, in its order, and a note on what was not searched."""
    rows, note = [row for row in index.snapshot() if _fits(row, query)], ""
    if query.text:
        rows, note = search.matching(rows, query.text)
    rows.sort(key=_KEYS[query.sort], reverse=query.descending)
    return rows, note


def _fits(row: ListedTrace, query: ListQuery) -> bool:
    summary = row.summary
    if query.stop and summary.stop != query.stop:
        return False
    if query.group and summary.group != query.group:
        return False
    if not query.reward:
        return True
    if summary.reward is None:
        return query.reward == "none"
    return query.reward == ("high" if summary.reward >= 1 else "low")


def row_values(row: ListedTrace) -> dict[str, Any]:
    """Return plain values of a row, for a page."""
    summary = row.summary
    return {
        "name": row.name,
        "step": row.place,
        "sample": row.sample,
        "problem": summary.prompt,
        "group": summary.group,
        "reward": summary.reward,
        "stop": summary.stop,
        "chunks": summary.chunks,
        "length": summary.length,
        "error": row.error,
    }


_GROUP_KEYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "problem": lambda group: group["problem"],
    "reward": lambda group: (group["reward"] is not None, group["reward"] or 0.0),
    "length": lambda group: group["length"],
}


def sorted_groups(groups: list[dict[str, Any]], query: ListQuery) -> list[dict[str, Any]]:
    """Return groups in the order of a query; by step they are in the order of their first rows."""
    if query.sort not in _GROUP_KEYS:
        return groups
    return sorted(groups, key=_GROUP_KEYS[query.sort], reverse=query.descending)


def grouped(rows: Sequence[ListedTrace]) -> list[dict[str, Any]]:
    """Return the groups of rows by problem, with the best and the worst trace of each."""
    groups: dict[str, list[ListedTrace]] = {}
    for row in rows:
        groups.setdefault(row.summary.group, []).append(row)
    found = []
    for key, own in groups.items():
        scored = [row for row in own if row.summary.reward is not None]
        ordered = sorted(scored, key=lambda row: (row.summary.reward, -row.summary.length))
        rewards = [row.summary.reward or 0.0 for row in scored]
        found.append(
            {
                "group": key,
                "step": own[0].place,
                "problem": own[0].summary.prompt,
                "traces": len(own),
                "reward": sum(rewards) / len(rewards) if rewards else None,
                "best": ordered[-1].name if ordered else None,
                "worst": ordered[0].name if ordered else None,
                "best_reward": ordered[-1].summary.reward if ordered else None,
                "worst_reward": ordered[0].summary.reward if ordered else None,
                "length": sum(row.summary.length for row in own) / len(own),
            }
        )
    return found
