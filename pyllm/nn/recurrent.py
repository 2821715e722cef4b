from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyllm import ops


class _Recurrent(torch.nn.RNNBase):
    """What RNN, GRU and LSTM share: torch's constructor and state dict, pyllm's operation."""

    _operation: staticmethod
    _extra: tuple[str, ...] = ()

    def forward(self, x: Tensor | PackedSequence, state: Any = None, lengths: Tensor | None = None) -> Any:
        """x: (B, T, input) or (T, B, input), as batch_first says; lengths: (B,), for sequences shorter than T.

        Returns the outputs, zero beyond a sequence's length, and the last states as torch's modules do.
        """
        if isinstance(x, PackedSequence):
            raise TypeError(f"{type(self).__name__} takes padded sequences and their lengths, but got a PackedSequence")
        if self.proj_size:
            raise NotImplementedError(f"{type(self).__name__} with proj_size is not available")
        options = {name: getattr(self, name) for name in self._extra}
        return self._operation(x, self._flat_weights, state, num_layers=self.num_layers, lengths=lengths,
                               bidirectional=self.bidirectional, dropout=self.dropout, training=self.training,
                               batch_first=self.batch_first, **options)  # fmt: skip


class RNN(_Recurrent, torch.nn.RNN):
    """torch.nn.RNN on `pyllm.ops.rnn`. Sequences of different lengths are padded and come with `lengths`."""

    _operation = staticmethod(ops.rnn)
    _extra = ("nonlinearity",)


class GRU(_Recurrent, torch.nn.GRU):
    """torch.nn.GRU on `pyllm.ops.gru`. Sequences of different lengths are padded and come with `lengths`."""

    _operation = staticmethod(ops.gru)


class LSTM(_Recurrent, torch.nn.LSTM):
    """torch.nn.LSTM on `pyllm.ops.lstm`. Sequences of different lengths are padded and come with `lengths`."""

    _operation = staticmethod(ops.lstm)


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell on `pyllm.ops.rnn_cell`; the same bits as one step of `RNN`."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        h = x.new_zeros(*x.shape[:-1], self.hidden_size) if h is None else h
        return ops.rnn_cell(
            x, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, nonlinearity=self.nonlinearity
        )


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell on `pyllm.ops.gru_cell`; the same bits as one step of `GRU`."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        h = x.new_zeros(*x.shape[:-1], self.hidden_size) if h is None else h
        return ops.gru_cell(x, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell on `pyllm.ops.lstm_cell`; the same bits as one step of `LSTM`."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if state is None:
            zeros = x.new_zeros(*x.shape[:-1], self.hidden_size)
            state = (zeros, zeros)
        return ops.lstm_cell(x, state, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
