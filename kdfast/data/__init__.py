"""Small offline problems by name, and what makes batches."""

from __future__ import annotations

import importlib

from kdfast.data.task import NamedRows, Rows, Task, models

__all__ = ["TASKS", "NamedRows", "Rows", "Task", "load_task", "models"]

# name: where its Task is made. Modules load on demand: they need the train extra.
TASKS = {
    "digits": "kdfast.data.digits:digits_task",
    "noisy_digits": "kdfast.data.digits:noisy_digits_task",
    "canvases": "kdfast.data.canvases:canvases_task",
    "canvas_cnns": "kdfast.data.canvases:canvas_cnns_task",
    "canvas_stages": "kdfast.data.canvas_stages:canvas_stages_task",
    "digit_diffusion": "kdfast.data.digit_diffusion:digit_diffusion_task",
    "digit_few": "kdfast.data.digit_few:digit_few_task",
    "digit_graph": "kdfast.data.digit_graph:digit_graph_task",
    "digit_maps": "kdfast.data.digit_maps:digit_maps_task",
    "digit_maps_tail": "kdfast.data.digit_maps:digit_maps_tail_task",
    "digit_patches": "kdfast.data.digit_patches:digit_patches_task",
    "digit_nodes": "kdfast.data.digit_nodes:digit_nodes_task",
    "digit_nodes_unseen": "kdfast.data.digit_nodes:digit_nodes_unseen_task",
    "digit_parity": "kdfast.data.digit_residues:residue_task",
    "mixed_digits": "kdfast.data.mixed_digits:mixed_digits_task",
    "two_view_digits": "kdfast.data.two_view_digits:two_view_digits_task",
    "aspect_digits": "kdfast.data.aspect_digits:aspect_digits_task",
    "web_digits": "kdfast.data.web_digits:web_digits_task",
    "other_digits": "kdfast.data.other_digits:other_digits_task",
    "relabelled_digits": "kdfast.data.relabelled_digits:relabelled_digits_task",
    "digit_turns": "kdfast.data.digit_turns:digit_turns_task",
    "digit_stages": "kdfast.data.digit_stages:digit_stages_task",
    "digit_tree": "kdfast.data.digit_tree:digit_tree_task",
    "large_digits": "kdfast.data.large_digits:large_digits_task",
    "digit_tail": "kdfast.data.digit_tail:digit_tail_task",
}


def load_task(name: str) -> Task:
    """The Task of a name; ValueError naming those there are."""
    if name not in TASKS:
        raise ValueError(f"data: expected one of {', '.join(TASKS)}, got {name!r}")
    module, function = TASKS[name].split(":")
    return getattr(importlib.import_module(module), function)()
