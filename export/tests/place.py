"""A place for graphs beside the processor: whole on a WebGPU device, with the cache in its memory."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from blip2_export.run.sessions import Place

_ROOT = Path(__file__).parents[2]
_PROVIDER, _DEVICE = "WebGpuExecutionProvider", "webgpu"


class WebGpu(Place):
    """Opens only graphs that the device runs whole."""

    def __init__(self, device: ort.OrtEpDevice) -> None:
        super().__init__()
        self.device = device

    def session(self, path: Path) -> ort.InferenceSession:
        options = self._options()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([self.device], {})
        return ort.InferenceSession(str(path), options)

    def left_over(self, path: Path) -> list[str]:
        """Operators of a graph that the device leaves to the processor, one a node."""
        options = self._options()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_provider_for_devices([self.device], {})
        parts = ort.InferenceSession(str(path), options).get_provider_graph_assignment_info()
        return sorted(node.op_type for part in parts if part.ep_name != _PROVIDER for node in part.get_nodes())

    def keep(self, array: np.ndarray) -> ort.OrtValue:
        kept = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, _DEVICE, 0, 0)
        ort.copy_tensors([ort.OrtValue.ortvalue_from_numpy(array)], [kept])
        return kept

    def fetch(self, kept: ort.OrtValue) -> np.ndarray:
        array = np.empty(kept.shape(), np.float32)
        ort.copy_tensors([kept], [ort.OrtValue.ortvalue_from_numpy(array)])
        return array


@cache
def webgpu() -> WebGpu | str:
    """The first device of the plugin that `make setup-webgpu` installs, or why there is none."""
    plugin = next(_ROOT.glob(".venv/lib/python*/site-packages/onnxruntime_ep_webgpu/*webgpu*.so"), None)
    if plugin is None:
        return "the WebGPU plugin is not there; `make setup-webgpu` installs it"
    software = _ROOT / "target" / "swiftshader"
    if (software / ".stamp").exists():
        os.environ["VK_ICD_FILENAMES"] = str(software / "vk_swiftshader_icd.json")
        os.environ["ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"] = "1"
        ctypes.CDLL(str(software / "libvulkan.so.1"))  # the plugin finds by its name what is loaded
    try:
        ort.register_execution_provider_library(_DEVICE, str(plugin))
    except Exception as error:
        return f"the WebGPU plugin cannot be loaded: {error}"
    found = [device for device in ort.get_ep_devices() if device.ep_name == _PROVIDER]
    return (
        WebGpu(found[0]) if found else "the WebGPU plugin finds no device; `make setup-webgpu` installs one in software"
    )
