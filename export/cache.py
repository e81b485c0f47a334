"""The transformer graph's second form, for backends that own the memory of the cache.

The first form returns the grown keys and values, so each step copies the whole cache. In this
one tokens are the cache's first axis and only the new ones come out: written right behind the
old ones, they make the cache of the next step without a copy.
"""

from __future__ import annotations

import onnx_ir as ir

from runtime.bundle import NEW, PAST


def append_only(model: ir.Model) -> ir.Model:
    """Rewrite the traced transformer in place and return it.

    ``past_X`` (2B, P, C) becomes (P, 2B, C); instead of ``X`` (2B, P + L, C) the graph
    returns ``new_X`` (L, 2B, C).
    """
    graph = model.graph
    for past in [value for value in graph.inputs if str(value.name).startswith(PAST)]:
        name = str(past.name).removeprefix(PAST)
        place = next(i for i, value in enumerate(graph.outputs) if value.name == name)
        concat = graph.outputs[place].producer()
        assert concat is not None
        assert concat.op_type == "Concat"
        assert concat.inputs[0] is past
        fresh = concat.inputs[1]
        assert fresh is not None
        assert past.shape is not None
        graph.outputs[place].name = f"{name}.removed"
        both, tokens, width = past.shape
        past.shape = ir.Shape([tokens, both, width])
        # The old tokens are touched only together with the new ones: work on them alone could run
        # long before, for all layers at once, and hold a second copy of the whole cache.
        fresh_first = ir.node("Transpose", [fresh], {"perm": [1, 0, 2]}, name=f"{concat.name}_new")
        grown_first = ir.node(
            "Concat", [past, fresh_first.outputs[0]], {"axis": 0}, name=f"{concat.name}_grown"
        )
        graph.insert_before(concat, [fresh_first, grown_first])
        both_first = ir.node("Transpose", [grown_first.outputs[0]], {"perm": [1, 0, 2]}, name=concat.name)
        graph.insert_before(concat, both_first)
        both_first.outputs[0].name = f"grown_{name}"
        new = fresh_first.outputs[0]
        new.name, new.dtype = f"{NEW}{name}", past.dtype
        new.shape = ir.Shape(["length", both, width])
        graph.outputs[place] = new
        concat.outputs[0].replace_all_uses_with(both_first.outputs[0])
        graph.remove(concat, safe=True)
    return model
