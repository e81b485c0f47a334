"""A TensorRT that builds engines of paper: what a builder is told and gives back, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

from hart_runtime.runtime.memory.gpu import Gpu
from hart_runtime.runtime.tensorrt.package import Package

H200 = Gpu("NVIDIA H200", "9.0", 132, 150_000_000_000)
MEASURED = b"measured:"
FUSED = {"Name": "_gemm_mha_v2_myl0_7", "LayerType": "kgen", "TacticName": "_gemm_mha_v2_0xbc"}
PRODUCT = {"Name": "blocks.0.attn/MatMul_myl0_3", "LayerType": "gemm", "TacticName": "sm90_xmma_gemm_f16f16"}
SOFTMAX = {"Name": "__myl_MulMaxSubExpSum_myl0_4", "LayerType": "kgen", "TacticName": "__myl_MulMaxSubExpSum"}


class Cache:
    """Holds what was measured, for one GPU."""

    def __init__(self, gpu: str, data: bytes) -> None:
        kept = data.startswith(MEASURED + gpu.encode())  # what is damaged or another's is an empty cache
        self.gpu, self.graphs = gpu, set(data.decode().split(":")[2].split()) if kept else set()

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        self.graphs |= other.graphs
        return self.gpu == other.gpu

    def serialize(self) -> bytes:
        return MEASURED + f"{self.gpu}:{' '.join(sorted(self.graphs))}".encode()


class PaperTensorRT:
    """Its module. Tests look at what it was told, and decide what it says."""

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = "error", "internal error", "warning"

    class IProgressMonitor:
        pass

    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32")
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self) -> None:
        self.gpu = "h200"
        self.configs: list[Any] = []
        self.measured: list[str] = []
        """Graphs that had to be measured."""
        self.layers: list[Any] = [FUSED, PRODUCT]
        self.scratch = 3_000_000
        self.loads = True
        self.add_profile: Callable[[Any], int] = lambda profile: 0
        self.before_build: Callable[[str], None] = lambda graph: None

    def Builder(self, log: Any) -> Any:
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(),
            create_builder_config=self._config,
            create_optimization_profile=lambda: SimpleNamespace(
                set_shape=lambda *shape: None, set_shape_input=lambda *values: None
            ),
            build_serialized_network=self._build,
        )

    def OnnxParser(self, network: Any, log: Any) -> Any:
        def parse(path: str) -> bool:
            graph = onnx.load(path, load_external_data=False).graph
            network.name = Path(path).stem
            network.inputs = [
                SimpleNamespace(
                    name=value.name,
                    shape=tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim),
                    is_shape_tensor=value.name == "top_k",
                )
                for value in graph.input
            ]
            network.num_inputs, network.get_input = len(network.inputs), network.inputs.__getitem__
            layer = SimpleNamespace(num_inputs=len(network.inputs), get_input=network.inputs.__getitem__)
            network.num_layers, network.get_layer = 1, [layer].__getitem__
            return True

        return SimpleNamespace(parse_from_file=parse)

    def Runtime(self, log: Any) -> Any:
        information = json.dumps({"Layers": self.layers, "Bindings": []})
        inspector = SimpleNamespace(get_engine_information=lambda kind: information)

        def load(engine: bytes) -> Any:
            if not self.loads:
                return None
            return SimpleNamespace(
                num_optimization_profiles=2,
                get_device_memory_size_for_profile_v2=lambda i: self.scratch * (i + 1),
                create_engine_inspector=lambda: inspector,
            )

        return SimpleNamespace(deserialize_cuda_engine=load)

    def _config(self) -> Any:
        config = SimpleNamespace(flags={"TF32"}, cache=None)
        config.clear_flag = config.flags.discard
        config.set_memory_pool_limit = lambda pool, size: None
        config.create_timing_cache = lambda data: Cache(self.gpu, data)
        config.set_timing_cache = lambda cache, ignore: setattr(config, "cache", cache)
        config.get_timing_cache = lambda: config.cache
        config.add_optimization_profile = self.add_profile
        self.configs.append(config)
        return config

    def _build(self, network: Any, config: Any) -> bytes:
        self.before_build(network.name)
        if network.name not in config.cache.graphs:
            self.measured.append(network.name)
            config.cache.graphs.add(network.name)
        return f"engine of {network.name}".encode()


def paper_package(version: str = "10.13.3.9") -> tuple[Package, PaperTensorRT]:
    """A package for a GPU that it builds on, and its module."""
    api = PaperTensorRT()
    return Package("tensorrt", version, api), api
