from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyllm import ops
from pyllm.nn.quantized import Quantizable


class _Recurrent(Quantizable, torch.nn.RNNBase):
    """What RNN, GRU and LSTM share: torch's constructor and state dict, pyllm's operation.

    The weights can be quantised, see `Quantizable`: products with them are those of `ops.quantized_linear`.
    """

    _operation: staticmethod
    _gates = 1
    _extra: tuple[str, ...] = ()

    def forward(self, x: Tensor | PackedSequence, state: Any = None, lengths: Tensor | None = None) -> Any:
        """x: (B, T, input) or (T, B, input), as batch_first says; lengths: (B,), for sequences shorter than T.

        Returns the outputs, zero beyond a sequence's length, and the last states as torch's modules do.
        """
        if isinstance(x, PackedSequence):
            raise TypeError(f"{type(self).__name__} takes padded sequences and their lengths, but got a PackedSequence")
        if self.proj_size:
            raise NotImplementedError(f"{type(self).__name__} with proj_size is not available")
        weights = self._weights(self._flat_weights_names) if self.quantized else self._flat_weights
        return self._run(x, weights, state, num_layers=self.num_layers, lengths=lengths, dropout=self.dropout,
                         training=self.training)  # fmt: skip

    def _weights(self, names: list[str]) -> list[Any]:
        return [self.quantized.get(name) or getattr(self, name) for name in names]

    def _run(self, x: Tensor, weights: list[Any], state: Any = None, **options: Any) -> Any:
        options |= {name: getattr(self, name) for name in self._extra}
        return self._operation(x, weights, state, bidirectional=self.bidirectional, batch_first=self.batch_first,
                               **options)  # fmt: skip

    def sizes(self) -> dict[str, tuple[int, int]]:
        n, above = self._gates * self.hidden_size, self.hidden_size * (1 + self.bidirectional)
        found: dict[str, tuple[int, int]] = {}
        for side, (w_ih, w_hh, *_) in enumerate(self._all_weights):
            found |= {w_ih: (n, above if side > self.bidirectional else self.input_size), w_hh: (n, self.hidden_size)}
        return found

    def weight_inputs(self, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """The states that sequences begin with are not among them."""
        found: dict[str, Tensor] = {}
        directions = 1 + self.bidirectional
        for layer in range(0, len(self._all_weights), directions):
            sides = self._all_weights[layer : layer + directions]
            y, _ = self._run(x, self._weights([name for names in sides for name in names]), lengths=lengths)
            steps = y.transpose(0, 1) if self.batch_first else y
            forward, *backward = steps.chunk(directions, -1)
            for (w_ih, w_hh, *_), h in zip(sides, (forward[:-1], *(h[1:] for h in backward)), strict=True):
                found |= {w_ih: x, w_hh: h}
            x = y
        return found


class RNN(_Recurrent, torch.nn.RNN):
    """torch.nn.RNN on `pyllm.ops.rnn`. Sequences of different lengths are padded and come with `lengths`."""

    _operation = staticmethod(ops.rnn)
    _extra = ("nonlinearity",)


class GRU(_Recurrent, torch.nn.GRU):
    """torch.nn.GRU on `pyllm.ops.gru`. Sequences of different lengths are padded and come with `lengths`."""

    _operation = staticmethod(ops.gru)
    _gates = 3


class LSTM(_Recurrent, torch.nn.LSTM):
    """torch.nn.LSTM on `pyllm.ops.lstm`. Sequences of different lengths are padded and come with `lengths`."""

    _operation = staticmethod(ops.lstm)
    _gates = 4


class _Cell(Quantizable, torch.nn.RNNCellBase):
    """What the cells share: weights that can be quantised."""

    _gates = 1

    def sizes(self) -> dict[str, tuple[int, int]]:
        width = self.hidden_size * self._gates
        return {"weight_ih": (width, self.input_size), "weight_hh": (width, self.hidden_size)}

    def weight_inputs(self, x: Tensor, state: Any = None) -> dict[str, Tensor]:
        h = state[0] if isinstance(state, tuple) else state
        return {"weight_ih": x} | ({} if h is None else {"weight_hh": h})

    def _parameters_of_step(self) -> tuple[Any, ...]:
        weights = (self.quantized.get(name) or getattr(self, name) for name in ("weight_ih", "weight_hh"))
        return (*weights, self.bias_ih, self.bias_hh)


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell on `pyllm.ops.rnn_cell`; the same bits as one step of `RNN`."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        h = x.new_zeros(*x.shape[:-1], self.hidden_size) if h is None else h
        return ops.rnn_cell(x, h, *self._parameters_of_step(), nonlinearity=self.nonlinearity)


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell on `pyllm.ops.gru_cell`; the same bits as one step of `GRU`."""

    _gates = 3

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        h = x.new_zeros(*x.shape[:-1], self.hidden_size) if h is None else h
        return ops.gru_cell(x, h, *self._parameters_of_step())


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell on `pyllm.ops.lstm_cell`; the same bits as one step of `LSTM`."""

    _gates = 4

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if state is None:
            zeros = x.new_zeros(*x.shape[:-1], self.hidden_size)
            state = (zeros, zeros)
        return ops.lstm_cell(x, state, *self._parameters_of_step())
