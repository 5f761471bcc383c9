"""Batches of rows whose backbone states are stored."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from karla_hf.states import StoredStates


STATE_ROW = "state_row"  # column of a data set: where the row's states are


class StatesCollator:
    """Makes batches with `source_states` of rows that have a `state_row`, and others as `plain` does.

    Rows end together: padding stands on the left, where no backbone runs over it, so that the head thinks about few
    positions where only the ends of rows have labels.

    Args:
        plain: the trainer's own collator.
        stored: the states of one or more data sets; `state_row` counts through all of them.
        pad_id: token of padding.
    """

    def __init__(self, plain: Any, stored: Sequence[StoredStates], pad_id: int):
        self.plain, self.stored, self.pad_id = plain, stored, pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Args:
            rows: with `input_ids`, perhaps `labels`, and `state_row`.

        Returns:
            `input_ids`, `attention_mask` and `labels` [B, T] int64, `source_states` [B, T, L, D] as stored. The label of a
            row's first token is -100, since nothing predicts it.
        """
        if STATE_ROW not in rows[0]:
            return self.plain(rows)
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row.get("labels", row["input_ids"])) for row in rows]
        for label in labels:
            label[:1] = -100
        states = [self._states(row[STATE_ROW]) for row in rows]
        return {
            "input_ids": _pad_left(ids, self.pad_id),
            "attention_mask": _pad_left([torch.ones_like(row) for row in ids], 0),
            "labels": _pad_left(labels, -100),
            "source_states": _pad_left(states, 0),
        }

    def _states(self, row: int) -> torch.Tensor:
        for stored in self.stored:
            if row < len(stored):
                return stored[row]
            row -= len(stored)
        raise ValueError(f"A row of the data set asks for states {row} rows behind the last that are stored.")


def _pad_left(parts: list[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(parts, batch_first=True, padding_value=value, padding_side="left")
