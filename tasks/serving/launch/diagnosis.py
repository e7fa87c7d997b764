"""Why a server did not start: the usual causes, by what SGLang, torch and Hugging Face write into its log.

The first pattern found counts, so what is said first in the list is what hides behind what is said later: a port that
is taken makes SGLang report a dead worker, a gated model is also one that was not found. `{}` in a cause stands for
what the pattern's group matched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

PORT_TAKEN = "its port is taken"
_END_BYTES = 200_000  # of the log: a server that failed has said why near its end
_SHM = "/dev/shm is too small: enlarge it (a container: --shm-size=8g, or --ipc=host)"
_KILLED = ("it was killed (exit code -9), by the kernel for want of memory more often than by somebody: use a smaller "
           "model, fewer servers or a smaller launch.max_total_tokens, or free the machine's memory (dmesg says)")

CAUSES: tuple[tuple[str, str], ...] = (
    # the machine
    (r"address already in use|\bport (?:at )?\d+ is (?:already|not available|in use)|Could not bind port", PORT_TAKEN),
    (r"(?:/dev/shm|<?/torch_\d|<?/psm_).*No space left on device|No space left on device.*/dev/shm|"
     r"unable to (?:allocate shared memory|open shared memory object)|shared memory segment /dev/shm|\bBus error\b|"
     r"Unexpected bus error|Consider increasing /dev/shm size", _SHM),
    (r"No space left on device|Disk quota exceeded|Not enough free disk space",
     "the disk is full: free space where the log, the model cache (HF_HOME) and /tmp are"),
    # the GPU
    (r"Found no NVIDIA driver|No CUDA GPUs are available|libcuda\.so\S*: cannot open|Can't initialize NVML|"
     r"Torch not compiled with CUDA enabled|No (?:supported )?accelerator\b|CUDA is not available",
     "no usable GPU: check launch.gpus, CUDA_VISIBLE_DEVICES and the driver, or set launch.device: cpu"),
    (r"invalid device ordinal|device_index >= 0 && device_index < num_gpus",
     "there is no GPU of that number: check launch.gpus and CUDA_VISIBLE_DEVICES"),
    (r"NVIDIA driver on your system is too old|CUDA driver version is insufficient|forward compatibility was attempted|"
     r"system has unsupported display driver|PTX was compiled with an unsupported toolchain",
     "the NVIDIA driver is too old for the server's torch: update the driver, or install SGLang for an older CUDA"),
    (r"no kernel image is available|not compiled for .*(?:sm_\d+|capability)|"
     r"requires .{0,40}(?:compute capability|SM\d\d)|is not supported for the current GPU",
     "the GPU is not of a kind that this SGLang or a flag supports (see the log): choose other launch.flags, dtype or "
     "GPU"),
    (r"CUDA-capable device\(s\) is/are busy|exclusive.process", "the GPU is held by another process alone"),
    (r"memory capacity is unbalanced",
     "the GPUs have unequal free memory: another process holds one; free it, or choose other launch.gpus"),
    (r"Not enough memory\. Please try to increase --mem-fraction-static",
     "out of memory: the weights leave no room for the cache; raise launch.mem_fraction, use a smaller model, or free "
     "the device"),
    (r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|cuda\w*ErrorMemoryAllocation|out of memory",
     "out of memory: lower launch.mem_fraction or launch.max_total_tokens, use a smaller model or free the device"),
    (r"DefaultCPUAllocator|Cannot allocate memory|can't allocate memory|^MemoryError|unable to mmap",
     "out of memory: lower launch.max_total_tokens, use a smaller model or free the machine's memory"),
    # the model
    (r"gated repo(?:sitory)?|is restricted(?: and you are not in the authorized list|\. You must)",
     "the model is gated: accept its terms on its page at huggingface.co and set HF_TOKEN"),
    (r"requires? (?:setting )?--speculative-draft-model-path", "no draft model: set speculation.draft_model"),
    (r"is not a valid git identifier|Revision Not Found|Invalid rev id", "the model has no such revision: check its "
     "revision (a commit, tag or branch)"),
    (r"is not a valid model identifier|Repository Not Found|or a valid repository name|Repo id must",
     "no such model: check launch.model (a folder, or an id that this machine can download; a private one needs "
     "HF_TOKEN)"),
    (r"couldn't connect to \S*huggingface|OfflineModeIsEnabled|LocalEntryNotFound|outgoing traffic has been disabled|"
     r"Cannot find an appropriate cached snapshot|Max retries exceeded with url|Temporary failure in name resolution",
     "no such model on this machine, and the hub can't be reached: download it first, or set launch.model to a "
     "folder"),
    (r"40[13] Client Error|Invalid user token|\bUnauthorized\b", "the model needs an access token: set HF_TOKEN"),
    (r"PermissionError at .* when downloading", "the model cache can't be written: check the rights of HF_HOME"),
    (r"does not appear to have a file named|Cannot find any model weights|No model weights found|"
     r"Unrecognized model in|Should have a `model_type` key",
     "no such model: the folder or repository lacks a model's files (config.json, *.safetensors); check launch.model"),
    (r"Error while deserializing header|SafetensorError|MetadataIncompleteBuffer|InvalidHeader",
     "the model's weights are damaged or incomplete: download them again"),
    (r"Model architectures .* are not supported|does not recognize this architecture|has no SGLang implementation and|"
     r"No model architectures are specified",
     "this SGLang does not know the model's architecture: use another model or a newer SGLang"),
    (r"failed to be inspected", "the model's code could not be imported (see the log)"),
    (r"trust_remote_code=True|requires you to execute the",
     "the model brings code of its own: read it, and allow it by launch.flags: {trust-remote-code: true}"),
    (r"Can't load tokenizer|Couldn't instantiate the backend tokenizer|"
     r"Tokenizer class .*(?:was not found|not currently imported)",
     "the model's tokenizer can't be loaded (see the log)"),
    # the settings
    (r"context_length \(\d+\) is greater than the derived",
     "context_length is longer than the model's own: lower it"),
    (r"^\w*(?:Error|Exception): .*attention[ _]backend",
     "the attention backend does not fit the device, the model or deterministic mode: set another "
     "(launch.flags: {attention-backend: triton})"),
    (r"unrecognized arguments|invalid choice|expected one argument|ambiguous option|invalid \w+ value:|"
     r"the following arguments are required",
     "SGLang does not know a flag or its value: check launch.flags"),
    # the environment
    (r"No module named '?sglang\b", "its Python has no SGLang: check launch.python"),
    (r"leash: \[Errno (?:2|13)\]|Permission denied: '\S*python", "its Python can't be run: check launch.python"),
    (r"Permission denied|Read-only file system",
     "a file or folder must not be read or written: check the rights of the model, HF_HOME and /tmp"),
    (r"Could not find nvcc|CUDA_HOME environment variable is not set|ninja: build stopped|ninja is required",
     "SGLang wants to compile a kernel and can't: install the CUDA toolkit and ninja, or choose other backends"),
    (r"Too many open files", "too many open files: raise the limit (ulimit -n 65536)"),
    (r"can't start new thread|Resource temporarily unavailable",
     "no more threads or processes are allowed: raise the limit (ulimit -u)"),
    (r"^ModuleNotFoundError: No module named '?([\w.]+)", "a package is missing in the server's environment: {}"),
)

_BY_CODE = {
    9: _KILLED,
    4: "the CPU lacks an instruction that SGLang or torch was compiled for (exit code: illegal instruction)",
    7: _SHM,
    11: "it crashed (segmentation fault): a driver, torch and kernels that do not fit each other are the usual cause",
}
# Said at every start, well or not: SGLang passes over models whose packages are missing, and repeats its settings.
_NOISE = re.compile(r"server_args=|Ignore import error when loading|UserWarning: ")
_WORKER_DIED = re.compile(r"died during initialization \(exit code: (-?\d+)\)")
# One of SGLang's processes has failed and the root ends them all, itself too: its exit code says nothing.
_ENDS_ITSELF = "Received sigquit from a child process"


def cause(text: str, code: int | None = None, draft: str | None = None) -> str | None:
    """The usual cause of a server's end, by the end of its log and its exit code (negative: a signal).

    `draft`: its draft model, which may be the one that is missing.
    """
    for pattern, why in CAUSES:
        if found := re.search(pattern, text, re.IGNORECASE | re.MULTILINE):
            line = text[text.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0]
            why = why.replace("launch.model", "speculation.draft_model") if draft and draft in line else why
            return why.format(*found.groups()) if "{}" in why else why
    if worker := _WORKER_DIED.search(text):
        code = int(worker[1])
    elif code is None or _ENDS_ITSELF in text:
        return None
    return _BY_CODE.get(-code if code < 0 else code - 128)  # a shell, or the leash, adds 128


def read_end(log: Path) -> str:
    """The end of a log, without lines that say nothing of a failure; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(line for line in text.splitlines() if not _NOISE.search(line))


def last_lines(log: Path, lines: int) -> list[str]:
    """The last lines of a log that say something, cut to what a terminal shows."""
    return [line[:300] for line in read_end(log).splitlines() if line.strip()][-lines:]
