"""The compiled module: what csrc/module.cpp exposes. Kernels fill the outputs that are among their arguments."""

from collections.abc import Sequence
from typing import Any, TypeAlias

Array: TypeAlias = Any  # a tensor, or anything else with __dlpack__

def info() -> dict[str, Any]: ...
def set_num_threads(n: int, /) -> None: ...
def num_threads() -> int: ...
def set_isa(name: str, /) -> None: ...
def set_vnni(wanted: bool, /) -> None: ...
def set_amx(wanted: bool, /) -> None: ...
def emulating_cuda() -> bool: ...
def recording() -> bool: ...
def begin_rows(offsets: Array, at: int, x: Array, out: Array, /) -> None: ...
def keep_memory(t: Array, /) -> None: ...
def mark_rows(t: Array, /) -> None: ...
def end_rows() -> None: ...
def row_scopes() -> int: ...
def synchronize(device: int, /) -> None: ...

class Program:
    """Calls of operations, recorded by this thread while `record(True)` holds, to be run again."""

    steps_done: int
    steps_run: int
    ops: list[str]
    unfit: str
    def record(self, on: bool, /) -> None: ...
    def run(self) -> None: ...
    def generate(
        self,
        draw: Program | None,
        results: Sequence[Array],
        kept: Sequence[Array],
        ended: Array,
        stop_ids: Sequence[int],
        first: bool,
        /,
    ) -> None: ...

def adamw(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    first: Sequence[Array],
    second: Sequence[Array],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float | Array,
    /,
) -> None: ...
def activation_forward(gate: Array, up: Array | None, out: Array, op: str, kind: str, /) -> None: ...
def activation_backward(
    dy: Array,
    gate: Array,
    up: Array | None,
    dgate: Array,
    dup: Array | None,
    op: str,
    kind: str,
    /,
) -> None: ...
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    key_lengths: Array | None,
    query_segments: Array | None,
    key_segments: Array | None,
    page_table: Array | None,
    out: Array,
    lse: Array | None,
    weights: Array | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    /,
) -> None: ...
def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    key_lengths: Array | None,
    query_segments: Array | None,
    key_segments: Array | None,
    out: Array,
    lse: Array,
    weights: Array | None,
    dout: Array,
    dweights: Array | None,
    dq: Array | None,
    dk: Array | None,
    dv: Array | None,
    dbias: Array | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    /,
) -> None: ...
def cross_entropy_forward(
    logits: Array,
    targets: Array,
    losses: Array | None,
    statistics: Array | None,
    total: Array | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    /,
) -> None: ...
def cross_entropy_backward(
    logits: Array,
    targets: Array,
    statistics: Array,
    dloss: Array,
    dlogits: Array,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    /,
) -> None: ...
def linear_cross_entropy(
    x: Array,
    weight: Array,
    bias: Array | None,
    targets: Array,
    block: Array,
    losses: Array | None,
    total: Array | None,
    dloss: Array | None,
    dx: Array | None,
    dweight: Array | None,
    dbias: Array | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    /,
) -> None: ...
def elementwise(kind: str, a: Array, b: Array | None, out: Array, /) -> None: ...
def embedding_forward(ids: Array, weight: Array, out: Array, /) -> None: ...
def embedding_backward(ids: Array, dy: Array, dweight: Array, zeroed: bool, /) -> None: ...
def multiply_add(rounds: int, /) -> int: ...
def read(data: Array, /) -> None: ...
def checksum(data: Array, sums: Array, /) -> None: ...
def norm_forward(
    x: Array,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    y: Array,
    sum: Array | None,
    statistics: Array | None,
    centred: bool,
    eps: float,
    /,
) -> None: ...
def norm_backward(
    dy: Array,
    dsum: Array | None,
    h: Array,
    weight: Array | None,
    statistics: Array,
    dh: Array | None,
    dweight: Array | None,
    dbias: Array | None,
    centred: bool,
    /,
) -> None: ...
def linear(x: Array, weight: Array, bias: Array | None, y: Array, packed: bool, /) -> None: ...
def pack_linear(weight: Array, panels: Array, /) -> None: ...
def next_positions(lengths: Array, positions: Array, totals: Array, capacity: int, /) -> None: ...
def page_tile() -> int: ...
def prefer_large_pages(t: Array, /) -> None: ...
def give_back_file_pages(t: Array, /) -> bool: ...
def panel_width() -> int: ...
def matmul(a: Array, b: Array, bias: Array | None, c: Array, /) -> None: ...
def column_sum(a: Array, sums: Array, /) -> None: ...
def quantized_panel_width(on_cuda: bool, /) -> int: ...
def pack_quantized(
    values: Array, scales: Array, minimums: Array | None, panels: Array, bits: int, group: int, /
) -> None: ...
def check_quantized(
    panels: Array, n: int, k: int, bits: int, group: int, half_scales: bool, has_minimums: bool, /
) -> None: ...
def quantized_linear(
    x: Array,
    panels: Array,
    bias: Array | None,
    y: Array,
    bits: int,
    group: int,
    half_scales: bool,
    has_minimums: bool,
    /,
) -> None: ...
def quantized_linear_backward(
    dy: Array, panels: Array, dx: Array, bits: int, group: int, half_scales: bool, has_minimums: bool, /
) -> None: ...
def quantized_embedding(
    ids: Array,
    panels: Array,
    out: Array,
    vocabulary: int,
    bits: int,
    group: int,
    half_scales: bool,
    has_minimums: bool,
    /,
) -> None: ...
def recurrent_forward(
    op: str,
    kind: int,
    reverse: bool,
    x: Array,
    w_ih: Array,
    w_hh: Array,
    ih_format: Sequence[int],
    hh_format: Sequence[int],
    b_ih: Array | None,
    b_hh: Array | None,
    h0: Array | None,
    c0: Array | None,
    lengths: Array | None,
    y: Array,
    h_n: Array,
    c_n: Array | None,
    gates: Array | None,
    new_hidden: Array | None,
    tanh_cell: Array | None,
    cell: Array | None,
    /,
) -> None: ...
def recurrent_cell(
    op: str,
    kind: int,
    x: Array,
    h: Array,
    c: Array | None,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None,
    b_hh: Array | None,
    h_n: Array,
    c_n: Array | None,
    /,
) -> None: ...
def recurrent_backward(
    op: str,
    kind: int,
    reverse: bool,
    x: Array,
    w_ih: Array,
    w_hh: Array,
    h0: Array | None,
    c0: Array | None,
    lengths: Array | None,
    y: Array,
    gates: Array,
    new_hidden: Array | None,
    tanh_cell: Array | None,
    cell: Array | None,
    dy: Array | None,
    dh_n: Array | None,
    dc_n: Array | None,
    dx: Array | None,
    add_dx: bool,
    dw_ih: Array | None,
    dw_hh: Array | None,
    db_ih: Array | None,
    db_hh: Array | None,
    dh0: Array | None,
    dc0: Array | None,
    /,
) -> None: ...
def recurrent_steps(
    op: str,
    kind: int,
    reverse: bool,
    sums: Array,
    w_hh: Array,
    b_ih: Array | None,
    b_hh: Array | None,
    h0: Array | None,
    c0: Array | None,
    lengths: Array | None,
    y: Array,
    h_n: Array,
    c_n: Array | None,
    keep: bool,
    new_hidden: Array | None,
    tanh_cell: Array | None,
    cell: Array | None,
    /,
) -> None: ...
def recurrent_steps_backward(
    op: str,
    kind: int,
    reverse: bool,
    w_hh: Array,
    h0: Array | None,
    c0: Array | None,
    lengths: Array | None,
    y: Array,
    gates: Array,
    new_hidden: Array | None,
    tanh_cell: Array | None,
    cell: Array | None,
    dy: Array | None,
    dh_n: Array | None,
    dc_n: Array | None,
    dsums: Array,
    dproducts: Array | None,
    dh0: Array | None,
    dc0: Array | None,
    /,
) -> None: ...
def route(
    logits: Array,
    weights: Array,
    order: Array,
    places: Array,
    offsets: Array,
    active: int,
    normalised: bool,
    /,
) -> None: ...
def route_backward(
    logits: Array,
    weights: Array,
    dweights: Array,
    places: Array,
    offsets: Array,
    dlogits: Array,
    normalised: bool,
    /,
) -> None: ...
def unpack_blocks(
    kind: str,
    raw: Array,
    values: Array,
    scales: Array,
    minimums: Array | None,
    bits: int,
    group: int,
    /,
) -> bool: ...
def rope(
    x: Array,
    positions: Array,
    inv_freq: Array,
    out: Array,
    rotary_dim: int,
    interleaved: bool,
    scale: float,
    inverse: bool,
    /,
) -> None: ...
def sample(
    logits: Array,
    seeds: float | Array,
    positions: float | Array,
    temperature: float | Array,
    top_k: float | Array,
    top_p: float | Array,
    min_p: float | Array,
    typical_p: float | Array,
    repetition_penalty: float | Array,
    frequency_penalty: float | Array,
    presence_penalty: float | Array,
    history: Array | None,
    logit_bias: Array | None,
    given: Array | None,
    ids: Array,
    logprobs: Array,
    processed_logprobs: Array,
    /,
) -> None: ...
def write_pages(pages: Array, rows: Array, page_table: Array, positions: Array, /) -> None: ...
def wkv_chunk() -> int: ...
def wkv_forward(
    r: Array,
    w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    state: Array | None,
    lengths: Array | None,
    y: Array,
    final_state: Array,
    kept: Array | None,
    /,
) -> None: ...
def wkv_backward(
    r: Array,
    w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    state: Array | None,
    lengths: Array | None,
    kept: Array,
    dy: Array,
    dfinal: Array | None,
    dr: Array,
    dw: Array,
    dk: Array,
    dv: Array,
    da: Array,
    db: Array,
    dstate: Array | None,
    /,
) -> None: ...
