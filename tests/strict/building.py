"""How the played TensorRT builds: what it refuses, what it times, and the plan that comes out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx
from onnx import ModelProto

from tests.strict import sizes
from tests.strict.network import DATA_TYPES, Parsed
from tests.strict.parser import LARGEST_K, Attention, attentions
from tests.strict.plan import Plan, Profile, Tensor

if TYPE_CHECKING:
    from tests.strict.tensorrt import StrictTensorRT


def mistakes(trt: StrictTensorRT, network: Any, config: Any) -> Iterator[str]:
    """What a builder refuses a network and its settings for."""
    parsed: Parsed | None = network._parsed
    if parsed is None or not parsed.model.graph.output:
        yield "Network must have at least one output"
        return
    if trt.version.startswith("10") and not network.get_flag(
        trt.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    ):
        trt.breaks(29, "build_serialized_network", "a network that is not strongly typed keeps no types")
    if clash := {"FP16", "BF16", "INT8", "FP8"} & config._flags:
        yield f"{', '.join(sorted(clash))}: precision flags are not allowed with strongly typed networks"
    if trt.ahead_of_time and "CURRENT" in {c.name for c in config._capabilities} and not trt.runs_here:
        yield f"Cannot compile for target(s) {trt.card.capability}: not supported"
    fed = {value.name: parsed.shape(value) for value in network._fed}
    for number, profile in enumerate(config._profiles):
        for name, shape in fed.items():
            if name in parsed.shape_inputs:
                if name not in profile._values:
                    yield f"profile {number}: shape input {name} has no values"
                elif max(profile._values[name][2]) > LARGEST_K and _decides_k(parsed.model, name):
                    yield f"profile {number}: K of TopK may not pass {LARGEST_K}"
            elif "?" in shape or any(isinstance(n, str) for n in shape):
                if name not in profile._shapes:
                    yield f"profile {number}: input {name} is dynamic and has no shape"
                elif not _fits(shape, profile._shapes[name]):
                    yield f"profile {number}: shapes of {name} contradict {shape}"
    if not config._profiles and any(isinstance(n, str) for shape in fed.values() for n in shape):
        yield "Network has dynamic or shape inputs, but no optimization profile has been defined"


def _decides_k(model: ModelProto, name: str) -> bool:
    return any(node.op_type == "TopK" for node in model.graph.node) and bool(name)


def _fits(shape: tuple[int | str, ...], ranges: tuple[tuple[int, ...], ...]) -> bool:
    return all(
        len(found) == len(shape)
        and all(isinstance(n, str) or n == m for n, m in zip(shape, found, strict=True))
        for found in ranges
    )


def build_plan(trt: StrictTensorRT, parsed: Parsed, config: Any) -> Plan | None:
    """A plan, or None if the progress monitor ends it."""
    known = []
    fed = {value.name: parsed.shape(value) for value in parsed.model.graph.input}
    fixed: Profile = {
        name: ((tuple(shape),) * 3)  # type: ignore[misc]
        for name, shape in fed.items()
        if not any(isinstance(n, str) for n in shape)
    }
    profiles = [{**fixed, **profile._shapes} for profile in config._profiles] or [fixed]
    groups = attentions(parsed.model, parsed.types, trt.fuses_attention)
    hidden = {name for group in groups if group.fused for name in group.scores}
    scratch = []
    for profile in profiles:
        largest = {name: ranges[2] for name, ranges in profile.items()}
        known.append(sizes.tensors(parsed.model, largest, parsed.types))
        scratch.append(-(-sizes.peak(parsed.model, known[-1], hidden) // 256) * 256)
    if not _time_tactics(trt, parsed.model, known, config):
        return None
    whole = ModelProto()
    whole.CopyFrom(parsed.model)
    onnx.load_external_data_for_model(whole, str(parsed.folder))
    weights = sum(len(i.raw_data) for i in whole.graph.initializer)
    tensor = {v.name: v for v in (*whole.graph.input, *whole.graph.output)}
    initial = {i.name for i in whole.graph.initializer}
    return Plan(
        version=trt.version,
        system=trt.system,
        capabilities=trt.targets(config),
        gpu=trt.card.name if trt.cuda.cards else "",
        compatibility=config._compatibility.name,
        tf32="TF32" in config._flags,
        any_version="VERSION_COMPATIBLE" in config._flags,
        tensors=[
            Tensor(
                name, DATA_TYPES[parsed.types[name]], list(parsed.shape(value)), value in whole.graph.input
            )
            for name, value in tensor.items()
            if name not in initial
        ],
        on_host=parsed.shape_inputs,
        profiles=profiles,
        values=[profile._values for profile in config._profiles] or [{}],
        scratch=scratch,
        weights=weights,
        verbosity=config._verbosity.name,
        layers=[
            layer
            for number, tensors in enumerate(known)
            for layer in _layers(parsed.model, groups, tensors, parsed.types, number)
        ],
        model=whole.SerializeToString(),
    )


def _time_tactics(trt: StrictTensorRT, model: ModelProto, known: list[Any], config: Any) -> bool:
    """Time what no cache knows yet; False if the monitor does not want to go on."""
    cached = (
        set()
        if config._timing is None or "DISABLE_TIMING_CACHE" in config._flags
        else config._timing._tactics
    )
    phase, monitor = "Building Engine", config._monitor
    if monitor is not None:
        monitor.phase_start(phase, None, len(model.graph.node))
    wanted = True
    for number, node in enumerate(model.graph.node):
        for tensors in known:
            shapes = [tensors[name].shape for name in (*node.input, *node.output) if name in tensors]
            about = [node.op_type, shapes, [a.SerializeToString().hex() for a in node.attribute]]
            key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
            if key not in cached and not trt.ahead_of_time:
                trt.tactics_timed += 1
                time.sleep(trt.seconds_per_tactic)
                cached.add(key)
        if monitor is not None and not monitor.step_complete(phase, number):
            wanted = False
            break
    if monitor is not None:
        monitor.phase_finish(phase)
    return wanted


def _layers(
    model: ModelProto, groups: list[Attention], known: Any, types: dict[str, int], profile: int
) -> Iterator[dict[str, Any]]:
    """What an inspector tells of one profile: fused attention has a name that nothing else has."""
    fused = {number: group for group in groups if group.fused for number in group.nodes}
    nodes = [*model.graph.node]
    suffix = f" [profile {profile}]" if profile else ""
    for number, node in enumerate(nodes):
        group = fused.get(number)
        if group is not None and number != group.nodes[-1]:
            continue
        names = [nodes[n].name for n in group.nodes] if group else [node.name]
        product = node.op_type in {"MatMul", "Gemm", "Attention", "MultiHeadAttention"}
        name = f"_gemm_mha_v2_myl{profile}_{number}" if group else f"{node.name}_myl{profile}_{number}"
        tactic = "_gemm_mha_v2_0x" if group else "sm80_xmma_gemm_" if product else "__myl_"
        yield {
            "Name": name + suffix,
            "LayerType": "gemm" if product and not group else "kgen",
            "Inputs": [],
            "Outputs": [
                {
                    "Name": output,
                    "Dimensions": [*(known[output].shape or ())] if output in known else [],
                    "Format/Datatype": DATA_TYPES.get(types.get(output, 0), "").title(),
                }
                for output in node.output
                if output
            ],
            "TacticName": f"{tactic}{number:x}",
            "StreamId": 0,
            "Metadata": "".join(f"[ONNX Layer: {n}]" for n in names),
        }
