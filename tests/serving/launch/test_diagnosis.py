"""The usual causes, against what SGLang 0.5.23, torch, Hugging Face and the system say of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.serving.launch import diagnosis

SAID = [
    # SGLang's own words
    ("[Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address already in use", "port is tak"),
    ("OSError: [Errno 98] Address already in use", "port is taken"),
    ("ValueError: port at 30000 is not available in 60 seconds. port is used by a process already. "
     "process.name()='python'", "port is taken"),
    ("OSError: Could not bind port 30000 on any configured address family", "port is taken"),
    ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value: "
     "mem_fraction_static=0.1", "raise launch.mem_fraction"),
    ("RuntimeError: The memory capacity is unbalanced. Some GPUs may be occupied by other processes. "
     "pre_model_load_memory=10, local_gpu_memory=70", "unequal free memory"),
    ("ValueError: Model architectures ['XForCausalLM'] are not supported for now. Supported architectures: "
     "dict_keys(['LlamaForCausalLM'])", "does not know the model's architecture"),
    ("ValueError: XForCausalLM has no SGlang implementation and the Transformers implementation is not compatible with "
     "SGLang.", "does not know the model's architecture"),
    ("RuntimeError: Cannot find any model weights with `/models/x`", "lacks a model's files"),
    ("ValueError: Warning: User-specified context_length (9000) is greater than the derived context_length (2048). This "
     "may lead to incorrect model outputs", "longer than the model's own"),
    ("ValueError: Invalid attention backend: fa9", "attention backend does not fit"),
    ("ValueError: Currently only ['flashinfer', 'fa3', 'triton'] attention backends are supported for deterministic "
     "inference, but you explicitly specified 'trtllm_mha'", "attention backend does not fit"),
    ("AssertionError: GptOssForCausalLM requires one of ['triton', 'fa3'] attention backend, but got the following "
     "backends", "attention backend does not fit"),
    ("ValueError: DFLASH speculative decoding requires setting --speculative-draft-model-path.", "no draft model"),
    ("ValueError: The quantization method fp8 is not supported for the current GPU. Minimum capability: 89. Current "
     "capability: 80.", "not of a kind"),
    ("RuntimeError: No accelerator (CUDA, XPU, HPU, NPU, MUSA, MPS) or platform plugin is available.", "no usable GPU"),
    ("RuntimeError: Rank 0 scheduler died during initialization (exit code: -9). If exit code is -9 (SIGKILL), a common "
     "cause is the OS OOM killer. Run `dmesg -T | grep -i oom` to check.", "was killed"),
    ("RuntimeError: Rank 0 scheduler died during initialization (exit code: -7). If exit code is -9 (SIGKILL), a common "
     "cause is the OS OOM killer.", "/dev/shm"),
    ("RuntimeError: Rank 0 scheduler died during initialization (exit code: -4). If exit code is -9 (SIGKILL), a common",
     "lacks an instruction"),
    ("launch_server.py: error: unrecognized arguments: --no-such-flag", "launch.flags"),
    ("launch_server.py: error: argument --dtype: invalid choice: 'int3' (choose from 'auto')", "launch.flags"),
    ("launch_server.py: error: argument --tp-size: invalid int value: 'two'", "launch.flags"),
    # torch and CUDA
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has", "lower launch.mem_fraction"),
    ("torch.AcceleratorError: CUDA error: out of memory", "lower launch.mem_fraction"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
     "to allocate 99 bytes. Error code 12 (Cannot allocate memory)", "lower launch.max_total_tokens"),
    ("MemoryError", "lower launch.max_total_tokens"),
    ("RuntimeError: No CUDA GPUs are available", "no usable GPU"),
    ("RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", "no usable GPU"),
    ("AssertionError: Torch not compiled with CUDA enabled", "no usable GPU"),
    ("torch.AcceleratorError: CUDA error: invalid device ordinal", "no GPU of that number"),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).", "driver is too old"),
    ("RuntimeError: CUDA driver version is insufficient for CUDA runtime version", "driver is too old"),
    ("torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device", "not of a kind"),
    ("RuntimeError: unable to write to file </torch_12_34>: No space left on device (28)", "/dev/shm"),
    ("RuntimeError: unable to open shared memory object </torch_12_34> in read-write mode: No space left", "/dev/shm"),
    ("NCCL WARN Error while creating shared memory segment /dev/shm/nccl-a1B2c3 (size 9637888)", "/dev/shm"),
    ("RuntimeError: DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that", "/dev/shm"),
    ("RuntimeError: Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist", "CUDA toolkit"),
    # Hugging Face
    ("OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/m/l.\n"
     "401 Client Error. (Request ID: Root=1)", "model is gated"),
    ("Cannot access gated repo for url https://huggingface.co/m/l/resolve/main/config.json.\nAccess to model m/l is "
     "restricted and you are not in the authorized list.", "model is gated"),
    ("401 Client Error. (Request ID: 1)\n\nRepository Not Found for url: https://huggingface.co/api/models/no/such.\n"
     "Invalid username or password.", "no such model: check launch.model"),
    ("OSError: no/such is not a local folder and is not a valid model identifier listed on "
     "'https://huggingface.co/models'", "no such model: check launch.model"),
    ("OSError: abc is not a valid git identifier (branch name, tag name or commit id) that exists for this model name.",
     "no such revision"),
    ("404 Client Error.\n\nRevision Not Found for url: https://huggingface.co/m/l/resolve/abc/config.json.",
     "no such revision"),
    ("OSError: /models/x does not appear to have a file named config.json. Checkout", "lacks a model's files"),
    ("ValueError: Unrecognized model in /models/x. Should have a `model_type` key in its config.json.", "lacks a model'"),
    ("ValueError: The checkpoint you are trying to load has model type `x` but Transformers does not recognize this "
     "architecture. This could be", "does not know the model's architecture"),
    ("OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached "
     "files.", "the hub can't be reached"),
    ("huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the disk cache and outgoing "
     "traffic has been disabled.", "the hub can't be reached"),
    ("OSError: PermissionError at /root/.cache/huggingface/hub/x when downloading m/l. Check cache directory",
     "model cache can't be written"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata", "weights are damaged"),
    ("ValueError: The repository m/l contains custom code which must be executed to correctly load the model. Please "
     "pass the argument `trust_remote_code=True` to allow", "code of its own"),
    ("OSError: Can't load tokenizer for '/models/x'. If you were trying to load it from", "tokenizer can't be loaded"),
    # the system
    ("OSError: [Errno 28] No space left on device", "the disk is full"),
    ("OSError: [Errno 122] Disk quota exceeded: '/home/x'", "the disk is full"),
    ("PermissionError: [Errno 13] Permission denied: '/models/x/config.json'", "rights of the model"),
    ("leash: [Errno 2] No such file or directory: '/no/python'", "check launch.python"),
    ("leash: [Errno 13] Permission denied: '/etc/passwd'", "check launch.python"),
    ("/usr/bin/python: Error while finding module specification for 'sglang.launch_server' (ModuleNotFoundError: No "
     "module named 'sglang')", "no SGLang"),
    ("ModuleNotFoundError: No module named 'loguru'", "missing in the server's environment: loguru"),
    ("OSError: [Errno 24] Too many open files", "ulimit -n"),
    ("RuntimeError: can't start new thread", "ulimit -u"),
]


@pytest.mark.parametrize(("said", "expected"), SAID, ids=[said[:45] for said, _ in SAID])
def test_a_known_message_names_its_cause(said: str, expected: str) -> None:
    found = diagnosis.cause(f"[2026-01-01 00:00:00] Loading\nTraceback (most recent call last):\n  File x\n{said}\nend\n")
    assert found and expected in found


@pytest.mark.parametrize(("code", "expected"), [(-9, "want of memory"), (137, "want of memory"), (-11, "segmentation"),
                                                (139, "segmentation"), (135, "/dev/shm"), (-4, "instruction")])
def test_a_signal_names_the_cause_where_the_log_does_not(code: int, expected: str) -> None:
    assert expected in (diagnosis.cause("Loading weights\n", code) or "")
    assert "port" in (diagnosis.cause("Address already in use", code) or "")


@pytest.mark.parametrize("code", [None, 0, 1, 3, -15, 143])
def test_what_is_not_known_is_not_guessed(code: int | None) -> None:
    assert diagnosis.cause("Loading weights\nValueError: something quite new\n", code) is None


def test_that_sglang_killed_itself_is_no_sign_of_memory() -> None:
    assert diagnosis.cause("Received sigquit from a child process. It usually means the child failed.", -9) is None


def test_a_draft_model_that_is_missing_is_told_from_the_model() -> None:
    said = "OSError: no/draft is not a local folder and is not a valid model identifier listed on"
    assert "check speculation.draft_model" in (diagnosis.cause(said, draft="no/draft") or "")
    assert "check launch.model" in (diagnosis.cause(said, draft="another") or "")


HEALTHY = """server_args={'x': 'out of memory, address already in use'}
/x/awq.py:53: UserWarning: Only CUDA, HIP and XPU support AWQ currently.
  warnings.warn(f"Only CUDA, HIP and XPU support AWQ currently.")
[2026-01-01 00:00:00] Ignore import error when loading sglang.srt.models.x: No module named 'soundfile'
[2026-01-01 00:00:01] Load weight begin. avail mem=18.87 GB
[2026-01-01 00:00:04] Attention backend not explicitly specified. Use torch_native backend by default.
[2026-01-01 00:00:05] The server is fired up and ready to roll!
"""


def test_a_log_without_failure_names_none(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(HEALTHY)
    assert diagnosis.cause(diagnosis.read_end(log)) is None
    assert diagnosis.last_lines(log, 1) == ["[2026-01-01 00:00:05] The server is fired up and ready to roll!"]
    assert diagnosis.read_end(tmp_path / "none") == "" and diagnosis.last_lines(tmp_path / "none", 1) == []


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"OSError: [Errno 98] Address already in use\n" + b"\xc3\x28 x\n" * 60_000 + b"MemoryError\n")
    assert "out of memory" in (diagnosis.cause(diagnosis.read_end(log)) or "")
