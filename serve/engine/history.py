"""The tokens that penalties are computed of, kept on the device: a step sends those of sequences that are new, and the
device notes what it chooses."""

from __future__ import annotations

import torch
from torch import Tensor

NONE = -1  # where there is no token, as ops.apply_penalties takes it


class History:
    """Prompt and output of each penalized sequence, by its row of the runner's page table. It takes no memory before
    there is one."""

    def __init__(self, max_running: int, device: torch.device) -> None:
        self._prompts = torch.full((max_running, 0), NONE, dtype=torch.int64, device=device)
        self._outputs = self._prompts.clone()

    def take(self, rows: Tensor, prompts: Tensor, outputs: Tensor) -> None:
        """Begin these rows anew: rows [n], prompts and outputs [n, any], padded with -1."""
        self._prompts = _wide_enough(self._prompts, prompts.shape[1])
        self._outputs = _wide_enough(self._outputs, outputs.shape[1])
        self._prompts[rows], self._outputs[rows] = NONE, NONE
        self._prompts[rows, : prompts.shape[1]] = prompts
        self._outputs[rows, : outputs.shape[1]] = outputs

    def of(self, rows: Tensor, prompt: int, output: int) -> tuple[Tensor, Tensor]:
        """Prompts and outputs of these rows, [n, prompt] and [n, output]; longer ones there are none."""
        return self._prompts[rows, :prompt], self._outputs[rows, :output]

    def note(self, rows: Tensor, lengths: Tensor, ids: Tensor, longest: int) -> None:
        """Append the chosen ids [n] to the outputs of these rows, which have `lengths` tokens, at most `longest`."""
        self._outputs = _wide_enough(self._outputs, longest + 1)
        self._outputs[rows, lengths] = ids


def _wide_enough(table: Tensor, width: int) -> Tensor:
    """The table, or a copy that is at least so wide, half of it empty at most."""
    if width <= table.shape[1]:
        return table
    wider = table.new_full((table.shape[0], 1 << (width - 1).bit_length()), NONE)
    wider[:, : table.shape[1]] = table
    return wider
