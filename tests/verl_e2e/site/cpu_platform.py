"""A platform of verl without an accelerator: shared memory, gloo, and Ray's logical GPUs as places for workers.

verl imports this by ``VERL_USE_EXTERNAL_MODULES``, in every process. verl 0.9 and vLLM 0.27 need all of it on a CPU.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _Cpu(str):
    """``"cpu"`` for ``tensor.to(...)``, and a number in ``f"{name}:{index}"``."""

    def __format__(self, spec):
        return "0"


class _Device(ModuleType):
    """What verl calls of ``torch.cuda``; of memory it knows the machine's."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if "memory" in name and not name.startswith(("reset", "empty")):
            return lambda *_: 0
        return getattr(torch.cpu, name, lambda *_: None)

    def mem_get_info(self, *_):
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def is_available(self):
        return True

    def get_device_name(self, *_):
        return "cpu"

    def get_rng_state(self, *_):
        return torch.get_rng_state()

    def set_rng_state(self, state, *_):
        torch.set_rng_state(state)

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed


_DEVICE = _Device("cpu_device")


@PlatformRegistry.register(platform="cpu")
class Cpu(PlatformBase):
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: _DEVICE)

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return _Cpu("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"  # as many as ray_kwargs.ray_init.num_gpus says

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


# verl asks for one backend for CPUs and one for its device, which here are the same.
_init_process_group = torch.distributed.init_process_group


def _one_backend(backend=None, *arguments, **options):
    return _init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *arguments, **options)


torch.distributed.init_process_group = _one_backend

# vLLM packs linear layers for oneDNN and drops their parameters, so that weights could not be synchronised.
if "vllm" in sys.modules:
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False
