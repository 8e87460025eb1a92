"""The targets that a bundle can be for."""

from __future__ import annotations

from blip2_export.graphs.builder import Graph
from blip2_export.graphs.cpu import CpuGraph
from blip2_export.graphs.cuda import CudaGraph
from blip2_export.graphs.tensorrt import TensorRtGraph
from blip2_export.graphs.webgpu import WebGpuGraph

TARGETS: dict[str, type[Graph]] = {kind.target: kind for kind in (CpuGraph, WebGpuGraph, CudaGraph, TensorRtGraph)}
