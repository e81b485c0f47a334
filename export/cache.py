"""The transformer graph's second form, for backends that own the memory of the cache.

The first form returns the grown keys and values, so each step copies the whole cache. In this
one tokens are the cache's first axis and only the new ones come out: written right behind the
old ones, they make the cache of the next step without a copy.
"""

from __future__ import annotations

import onnx_ir as ir

from hart_runtime.runtime.contract import NEW, PAST


def append_only(model: ir.Model) -> ir.Model:
    """Rewrite the traced transformer in place and return it.

    ``past_X`` (R, P, C) becomes (P, R, C); instead of ``X`` (R, P + L, C) the graph
    returns ``new_X`` (L, R, C).
    """
    graph = model.graph
    _count_rows_in_x(graph)
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
        rows, tokens, width = past.shape
        past.shape = ir.Shape([tokens, rows, width])
        # The old tokens are touched only together with the new ones: work on them alone could run
        # long before, for all layers at once, and hold a second copy of the whole cache.
        fresh_first = ir.node("Transpose", [fresh], {"perm": [1, 0, 2]}, name=f"{concat.name}_new")
        grown_first = ir.node(
            "Concat", [past, fresh_first.outputs[0]], {"axis": 0}, name=f"{concat.name}_grown"
        )
        graph.insert_before(concat, [fresh_first, grown_first])
        rows_first = ir.node("Transpose", [grown_first.outputs[0]], {"perm": [1, 0, 2]}, name=concat.name)
        graph.insert_before(concat, rows_first)
        rows_first.outputs[0].name = f"grown_{name}"
        new = fresh_first.outputs[0]
        new.name, new.dtype = f"{NEW}{name}", past.dtype
        new.shape = ir.Shape(["length", rows, width])
        graph.outputs[place] = new
        concat.outputs[0].replace_all_uses_with(rows_first.outputs[0])
        graph.remove(concat, safe=True)
    return model


def _count_rows_in_x(graph: ir.Graph) -> None:
    """The exporter asks whichever input it likes for the number of rows; tokens are never asked for."""
    x = next(value for value in graph.inputs if value.name == "x")
    for past in [value for value in graph.inputs if str(value.name).startswith(PAST)]:
        for node, place in [use for use in past.uses() if use.node.op_type == "Shape"]:
            assert node.attributes.get_int("start", 0) == 0
            assert node.attributes.get_int("end", None) == 1
            node.replace_input_with(place, x)
