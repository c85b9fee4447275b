"""Adapting a model and taking the adapters out again: conversions in place."""

from keras_lora.inject.allotting import METHODS, allotted, with_ranks
from keras_lora.inject.apply import apply_lora, drop, install
from keras_lora.inject.choosing import computing_scaled, computing_with
from keras_lora.inject.cloning import bare_copy, base_variables
from keras_lora.inject.compiled import changing, refresh
from keras_lora.inject.freezing import original_flag, thawed_by_others
from keras_lora.inject.keras_savers import guard_keras_savers
from keras_lora.inject.leaving import leaving
from keras_lora.inject.measuring import batches_of, check_batches, left_as_it_was
from keras_lora.inject.merge import merge_lora, merged, unload, unload_lora
from keras_lora.inject.patterns import parameters_of, rank_pattern
from keras_lora.inject.plan import (
    Plan,
    PlannedLayer,
    plan_factors,
    plan_layers,
    plan_of,
    unique,
)
from keras_lora.inject.quantizing import is_merged_apart
from keras_lora.inject.rematerializing import rematerialize, unrematerialize
from keras_lora.inject.replacing import loses_dropout, misfits, replace
from keras_lora.inject.switching import (
    active_names,
    adapted,
    adapter_names,
    check_adapted,
    check_names,
    check_no_dora,
    switch,
    trained_by_none,
    whole_adapters,
)
from keras_lora.inject.tracing import are_without_values, in_trace, without_values
from keras_lora.inject.turns import CHOOSING, context, turn

__all__ = [
    "CHOOSING",
    "METHODS",
    "Plan",
    "PlannedLayer",
    "active_names",
    "adapted",
    "adapter_names",
    "allotted",
    "apply_lora",
    "are_without_values",
    "bare_copy",
    "base_variables",
    "batches_of",
    "changing",
    "check_adapted",
    "check_batches",
    "check_names",
    "check_no_dora",
    "computing_scaled",
    "computing_with",
    "context",
    "drop",
    "guard_keras_savers",
    "in_trace",
    "install",
    "is_merged_apart",
    "leaving",
    "left_as_it_was",
    "loses_dropout",
    "merge_lora",
    "merged",
    "misfits",
    "original_flag",
    "parameters_of",
    "plan_factors",
    "plan_layers",
    "plan_of",
    "rank_pattern",
    "refresh",
    "rematerialize",
    "replace",
    "switch",
    "thawed_by_others",
    "trained_by_none",
    "turn",
    "unique",
    "unload",
    "unload_lora",
    "unrematerialize",
    "whole_adapters",
    "with_ranks",
    "without_values",
]
