"""The C core. Arrays come in as NumPy arrays, or as objects with `__array__` or a buffer."""

from os import PathLike
from typing import Any, Literal, TypedDict, final, type_check_only

import numpy as np
from numpy.typing import NDArray

# formats: csrc/python/py_quant.c, py_quantized_tensor.c; the bytes are drawn in docs/formats.md

@final
class QuantizedTensor:
    """A weight matrix W (rows, cols) in one of the formats, immutable. Its arrays are read-only
    views that keep it alive; parts that a format does not have are None."""

    @property
    def format(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def blocksize(self) -> int | None: ...
    @property
    def packed(self) -> NDArray[Any]:
        """4-bit: uint8 ((n + 1) // 2,); int8: int8 (rows, cols); f32, f16, bf16: the values
        (rows, cols) as float32, float16, and uint16 bits."""
    @property
    def absmax(self) -> NDArray[np.float32] | None: ...
    @property
    def absmax_codes(self) -> NDArray[np.uint8] | None: ...
    @property
    def nested_absmax(self) -> NDArray[np.float32] | None: ...
    @property
    def nested_quant_map(self) -> NDArray[np.float32] | None: ...
    @property
    def offset(self) -> float | None: ...
    @property
    def quant_map(self) -> NDArray[np.float32] | None: ...
    @property
    def scb(self) -> NDArray[np.float32] | None: ...
    @property
    def dtype_name(self) -> str | None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def bits_per_weight(self) -> float: ...
    def dequantize(self) -> NDArray[np.float32]: ...
    def error(
        self, source: Any, dtype: str | None = None, name: str = "source"
    ) -> dict[str, float]:
        """mean_abs, max_abs, rmse, sqnr_db against the unquantized array of the same shape."""
    def matmul(
        self,
        x: Any,
        bias: Any = None,
        *,
        isa: str | None = None,
        threads: int | None = None,
        int8_threshold: float = 6.0,
        int8_outliers: str = "row",
        compute: str = "exact",
    ) -> NDArray[np.float32]:
        """y = x W^T + bias by the CPU kernels: the bits of matmul_reference; see `linear`. The
        first call packs the weight and keeps that form beside the standard one."""
    def matmul_reference(
        self,
        x: Any,
        bias: Any = None,
        threshold: float = 6.0,
        *,
        batch_outliers: bool = False,
        tier: str = "exact",
    ) -> NDArray[np.float32]:
        """y = x W^T + bias in the order of summation of csrc/core/linear_ref.h; x float32 (m, cols)
        or (cols,). tier: exact, int16 or int8 (4-bit weights), bf16 (bf16 weights),
        bf16x2 (both)."""
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The dequantized values, so that who takes an array takes a quantized tensor."""
    def __dlpack__(self, **options: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __copy__(self) -> QuantizedTensor: ...
    def __deepcopy__(self, memo: Any, /) -> QuantizedTensor: ...

def quantize(
    array: Any,
    format: str,
    blocksize: int = 64,
    *,
    allow_nonfinite: bool = False,
    name: str = "array",
    dtype: str | None = None,
    isa: str | None = None,
) -> QuantizedTensor:
    """isa: of the functions, "reference" the plain ones; the bytes do not depend on it."""

def quantized_from_parts(
    format: str,
    shape: tuple[int, int],
    packed: Any,
    *,
    blocksize: int | None = None,
    absmax: Any = None,
    absmax_codes: Any = None,
    nested_absmax: Any = None,
    nested_quant_map: Any = None,
    offset: float | None = None,
    quant_map: Any = None,
    scb: Any = None,
    dtype_name: str | None = None,
    name: str = "weight",
    allow_nonfinite: bool = False,
) -> QuantizedTensor: ...
def codebook(name: Literal["nf4", "fp4", "dynamic"], /) -> NDArray[np.float32]: ...
def _alloc_fail_at(n: int, /) -> None: ...

# sampling: csrc/python/py_sampler.c, py_logit_stats.c; the definitions are in docs/sampling.md

def sample(
    logits: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    seed: Any = 0,
    prompt: Any = 0,
    step: Any = 0,
    keep_ties: Any = False,
    round_bf16: Any = False,
    history: Any = None,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Any, Any, Any]:
    """tokens int64, logprobs float32, sampling_logprobs float32: arrays (n,), or numbers for one
    row. isa: an instruction set, or "core" for the plain reference; the bits are the same.
    round_bf16: the logits are rounded to bfloat16 first."""

def distribution(
    logits: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    keep_ties: Any = False,
    history: Any = None,
    isa: str | None = None,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """The probabilities that sample draws from, in the shape of logits."""

def logprobs(
    logits: Any, tokens: Any, *, isa: str | None = None, threads: int | None = None
) -> Any:
    """log softmax(logits)[token] of each row: float64 (n,), or a float for one row."""

def logit_stats(
    ref: Any,
    test: Any,
    temperatures: Any,
    targets: Any = None,
    *,
    isa: str | None = None,
    threads: int | None = None,
    decoder: Decoder | None = None,
) -> dict[str, NDArray[Any]]:
    """The arrays of qllm.LogitStats by name, and same_top as uint8. decoder: the statistics are
    computed on its device where it offers that; the bits are the same."""

def gumbel(seed: Any, prompt: Any, step: Any, tokens: Any) -> Any:
    """Standard Gumbel noise of tokens: float64 (n,), or a float for one token."""

def philox(counter: Any, key: Any) -> tuple[int, int, int, int]:
    """Philox4x32-10."""

@type_check_only
class CpuInfo(TypedDict):
    model: str
    features: list[str]
    isas: list[str]
    compiled: list[str]
    default: str
    threads_available: int
    threads_default: int
    cores: int
    logical: int
    quota: int

def cpu_info() -> CpuInfo: ...
def _pretend_cores(n: int, /) -> None: ...
def _processors(root: str, /) -> dict[str, int]: ...
def _threads_cover(threads: int, n: int, rounds: int, /) -> tuple[int, int, list[int]]: ...
def linear(
    weight: QuantizedTensor,
    x: Any,
    bias: Any = None,
    *,
    isa: str | None = None,
    threads: int | None = None,
    int8_threshold: float = 6.0,
    int8_outliers: str = "row",
    compute: str = "exact",
) -> NDArray[np.float32]:
    """y = x W^T + bias, (m, rows) for x float32 (m, cols), (rows,) for (cols,)."""

def linear_name(
    weight: QuantizedTensor, m: int, *, isa: str | None = None, compute: str = "exact"
) -> str:
    """Which kernel multiplies m rows by this weight."""

# csrc/python/py_encode.c

def pack_roundtrip(
    weight: QuantizedTensor, *, isa: str | None = None, threads: int | None = None
) -> QuantizedTensor: ...
def pack_source(
    array: Any,
    format: str,
    blocksize: int = 64,
    *,
    name: str = "array",
    dtype: str | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[QuantizedTensor, dict[str, float]]:
    """Quantized straight into the CPU's layout, unpacked again, and its error."""

def quantize_pass(
    array: Any,
    format: str,
    blocksize: int = 64,
    *,
    name: str = "array",
    dtype: str | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> None:
    """Reads and quantizes and keeps nothing: what that costs by itself."""

# packed weights in memory of other libraries: csrc/python/py_image.c over csrc/cpu/image.h

def image(weight: QuantizedTensor, /) -> NDArray[np.uint8]:
    """A weight packed for the CPU kernels, as uint8 (n,) that owns its memory; private to a build
    of qllm."""

def image_from_source(
    array: Any,
    format: str,
    blocksize: int = 64,
    *,
    name: str = "array",
    dtype: str | None = None,
) -> NDArray[np.uint8]:
    """image(quantize(array, format, blocksize)) without the standard bytes between."""

def image_sizes(format: str, rows: int, cols: int, blocksize: int, /) -> tuple[int, int]:
    """Bytes of such an image, and nbytes of the weight."""

def image_weight(image: Any, dtype_name: str | None = None, /) -> QuantizedTensor: ...
def image_error(
    image: Any, source: Any, dtype: str | None = None, name: str = "source", /
) -> dict[str, float]:
    """image_weight(image).error(source) without a copy of the weight."""

def image_dequantize(image: Any, first: int, n: int, dtype: str = "float32", /) -> NDArray[Any]:
    """Rows [first, first + n) of the weight (n, cols), exactly, rounded to dtype: float32, float16,
    or bfloat16 as its bits in uint16."""

def image_linear_name(image: Any, m: int, compute: str, /) -> str:
    """Which kernel multiplies m rows by this weight."""

def use_team(parallel: int, max_threads: int, thread_num: int, /) -> None:
    """Products by address run in the threads of another library from now on: addresses of
    GOMP_parallel, omp_get_max_threads and omp_get_thread_num as it calls them; 0, 0, 0: in threads
    of qllm's own."""

def image_linear(
    image: int,
    nbytes: int,
    x: int,
    dtype: int,
    m: int,
    cols: int,
    bias: int,
    bias_dtype: int,
    y: int,
    rows: int,
    compute: str,
    int8_threshold: float,
    /,
) -> None:
    """y = x W^T + bias; image, x, bias (0: none) and y are addresses of memory that the caller
    holds, x (m, cols) and y (m, rows) contiguous, of one dtype: 0 float32, 1 float16, 2
    bfloat16."""

def image_linear_int8(
    image: int,
    nbytes: int,
    x: int,
    dtype: int,
    m: int,
    cols: int,
    bias: int,
    bias_dtype: int,
    y: int,
    rows: int,
    q: int,
    absmax: int,
    outliers: int,
    n_outliers: int,
    /,
) -> None:
    """The same for an int8 weight and an x that is rounded already: addresses of q int8 (m, cols)
    in units of absmax float32 (m,) / 127 and of outliers int64 (n_outliers,), the columns that are
    added from x in every row."""

def round_int8(
    x: int, dtype: int, m: int, cols: int, threshold: float, q: int, absmax: int, used: int, /
) -> None:
    """Rounds x (m, cols) as bitsandbytes does for LLM.int8(), by addresses: q int8 (m, cols),
    absmax float32 (m,), used uint8 (cols,) 1 for the columns that hold |x| >= threshold."""

def sample_words(*addresses_and_nbytes: int) -> int:
    """A number that most changes of these pieces of memory change: address, nbytes, address, ..."""

# the limits of this machine: csrc/python/py_limits.c over csrc/cpu/limits.h

def limit_buffer(nbytes: int, /) -> NDArray[np.uint8]:
    """Memory for read_limit: uint8 (n,), n a multiple of 4096, read-only, on huge pages."""

def read_limit(
    buffer: Any, begin: int, nbytes: int, *, isa: str | None = None, threads: int | None = None
) -> int:
    """Reads nbytes from begin on (multiples of 4096): the exclusive or of their 64-bit words."""

def multiply_units(*, isa: str | None = None) -> dict[str, str]:
    """f32, int16, int8, bf16 as far as they are there -> the instruction."""

def multiply_limit(
    unit: str, turns: int, *, isa: str | None = None, threads: int | None = None
) -> int:
    """Multiply-adds done in registers in `turns` turns on every thread."""

# devices: csrc/python/py_device.c

@type_check_only
class DeviceInfo(TypedDict):
    name: str
    variant: str
    driver: str
    memory: int
    free: int

def device_info(device: str, /) -> DeviceInfo | None:
    """A device that is not the processor ("cuda", or "cuda:1"), opened when asked for; None for
    "cpu"."""

@type_check_only
class DeviceLimits(TypedDict):
    read_bytes_per_second: float
    copy_bytes_per_second: float
    edge_seconds: float
    dependent_edge_seconds: float

def device_limits(device: str, nbytes: int, /) -> DeviceLimits | None:
    """What a device can do at best, measured on twice nbytes of its memory; None for "cpu"."""

def _load_device(path: str | PathLike[str], /) -> str:
    """Opens the plugin of a device; returns its name."""

@final
class DeviceLinear:
    """A weight on a device that is no processor, to multiply tensors there by address
    (csrc/python/py_device_linear.c)."""

    def __new__(
        cls,
        weight: QuantizedTensor,
        device: str,
        *,
        compute: str = "auto",
        int8_threshold: float = 6.0,
    ) -> DeviceLinear: ...
    @property
    def device(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
    def kernel(self, m: int, /) -> str:
        """Which kernel multiplies m rows."""
    def scratch(self, dtype: int, m: int, bias: int, bias_dtype: int, /) -> int:
        """Bytes of scratch that multiply wants for these."""
    def multiply(
        self,
        x: int,
        dtype: int,
        m: int,
        cols: int,
        bias: int,
        bias_dtype: int,
        y: int,
        rows: int,
        scratch: int,
        nbytes: int,
        stream: int,
        /,
    ) -> None:
        """y = x W^T + bias, given to a stream: waits for nothing. Addresses of the device's memory;
        scratch (nbytes,) is aligned to 16 and this call's alone until its work is done."""
    def dequantize(self, first: int, n: int, out: int, stream: int, /) -> None:
        """Rows [first, first + n) of the weight, exactly, to out float32 (n, cols)."""

# the decoder: csrc/python/py_decoder.c over csrc/core/backend.h

@final
class Sequence:
    """The keys and values of one sequence, made by Decoder.sequence() or fork(); freed with it."""

    @property
    def length(self) -> int:
        """Positions stored so far."""
    def fork(self) -> Sequence:
        """Shares what is stored so far (stored once, read-only); both go on independently."""
    def truncate(self, length: int, /) -> None:
        """Forgets positions >= length; shared parts are never changed."""

@final
class Decoder:
    def __new__(
        cls,
        config: dict[str, Any],
        *,
        device: str = "cpu",
        threads: int | None = None,
        isa: str | None = None,
        int8_threshold: float = 6.0,
        int8_outliers: Literal["row", "batch"] = "row",
        compute: str = "exact",
    ) -> Decoder:
        """config: the fields of csrc/decoder/config.h, enums as strings ("serial", "parallel",
        "parallel2"; "rms", "layer"; "silu", "gelu", "gelu_tanh"; "rope", "alibi"), arrays as
        float32 or integer arrays. isa None: QLLM_CPU from the environment, else the best."""
    def slots(self) -> dict[str, tuple[int, ...]]: ...
    def missing(self) -> list[str]: ...
    def set_linear(self, slot: str, weight: QuantizedTensor, bias: Any = None) -> None:
        """bias float32 (rows,). Replaces what was there, which stays on failure."""
    def set_vector(self, slot: str, values: Any) -> None:
        """values float32 (n,)."""
    def set_embedding(self, weight: QuantizedTensor, /) -> None:
        """A float format, (vocab, hidden)."""
    def load_linear(
        self,
        slot: str,
        array: Any,
        format: str,
        blocksize: int = 64,
        bias: Any = None,
        *,
        name: str = "array",
        dtype: str | None = None,
    ) -> int:
        """set_linear(slot, quantize(array, format, blocksize), bias) without a second copy; returns
        nbytes of that QuantizedTensor."""
    def load_embedding(
        self, array: Any, format: str, *, name: str = "array", dtype: str | None = None
    ) -> None:
        """The same for the embedding."""
    def set_random(self, slot: str, format: str, blocksize: int = 64, seed: int = 0) -> int:
        """Fills a linear slot or "embedding" with random weights (csrc/core/random_weight.h), made
        on the device where it offers that; returns nbytes of that QuantizedTensor."""
    def tie_embedding(self) -> None:
        """The embedding becomes the head's weight, of a float format, held once; it stays what it
        is when the head is set anew."""
    def linear(self, slot: str, /) -> QuantizedTensor:
        """The bytes that were set; "embedding" too."""
    def linear_error(
        self, slot: str, array: Any, *, name: str = "array", dtype: str | None = None
    ) -> dict[str, float]:
        """linear(slot).error(array) without a copy of the weight."""
    def sequence(self) -> Sequence: ...
    def step(
        self, sequences: list[Sequence] | tuple[Sequence, ...], tokens: Any, want: Any = None
    ) -> NDArray[np.float32]:
        """Logits (wanted rows, vocab) of one row per (sequences[i], tokens[i]); the rows of a
        sequence are consecutive and are its next positions. want bool (n,). All or nothing."""
    def step_draw(
        self,
        sequences: list[Sequence] | tuple[Sequence, ...],
        tokens: Any,
        want: Any,
        rows: Any,
        *,
        temperature: Any = 1.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        min_p: Any = 0.0,
        repetition_penalty: Any = 1.0,
        seed: Any = 0,
        prompt: Any = 0,
        step: Any = 0,
        keep_ties: Any = False,
        round_bf16: Any = False,
        history: Any = None,
        logits: bool = False,
        threads: int | None = None,
    ) -> tuple[
        NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None
    ]:
        """step, and draws from its logits as by sample: tokens, logprobs, sampling_logprobs (draws)
        and the logits, if asked for. rows: the wanted row of each draw, ascending. The draws are
        made on the device where it offers that. All or nothing, a draw's error included."""
    def embed(self, tokens: Any, /) -> NDArray[np.float32]:
        """Hidden states (n, hidden) of token ids; needs the embedding alone."""
    def blocks(
        self, sequences: list[Sequence] | tuple[Sequence, ...], hidden: Any
    ) -> NDArray[np.float32]:
        """Hidden states (n, hidden) after all layers of this decoder, rows as in step; needs the
        slots of the layers alone."""
    def head(self, hidden: Any, /) -> NDArray[np.float32]:
        """Logits (n, vocab) of hidden states; needs the final norm and the head alone.
        head(blocks(sequences, embed(tokens))) has the bits of step."""
    def info(self) -> dict[str, Any]:
        """device, isa, threads, cpu_model, compute, attention (how keys and values are held and
        read), kernels ({format: [names]}), int8_threshold, int8_outliers."""
    def nbytes(self) -> dict[str, int]:
        """weights, embedding (0 when it is the head's weight), kv_cache, scratch."""
