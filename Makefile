# On a fresh machine with Python 3.11+: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3
# Notices of a library that looks for a GPU are no news on a machine without one.
export CUDA_VISIBLE_DEVICES ?= -1
# Containers often set it. Then each process compiles TensorFlow's and Keras's modules anew, for 15 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo many-tasks find-the-rank causal-lm image-classification image-generation time-series test quick lint \
	test-tensorflow test-backends docs architectures support predictions bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/text_classification.py

# Two tasks on one encoder.
many-tasks: $(VENV)/.demo
	$(BIN)/python examples/many_tasks.py

# From a large rank to the one that suffices, with pictures.
find-the-rank: $(VENV)/.dev
	$(BIN)/python examples/find_the_rank.py

# A language model, and its adapter to PEFT and back. Its weights are in a GGUF file.
causal-lm: $(VENV)/.dev
	$(BIN)/pip install --quiet "gguf>=0.17"
	$(BIN)/python examples/causal_lm.py

# Convolutions, a diffusion model and a recurrent network, each against the other ways to fine-tune.
image-classification image-generation time-series: $(VENV)/.plot
	$(BIN)/python examples/$(subst -,_,$@).py

test: lint test-tensorflow test-backends docs

# Within four minutes: lint, types, and the invariants of the core on TensorFlow.
QUICK_TESTS := $(addprefix tests/test_,layering.py lengths.py config.py layers.py embedding.py \
	walker.py inject.py inject_refused.py adapters_heads.py adapters_combine.py adapter_files.py \
	serialization.py earlier_files.py atomic.py)
quick: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(QUICK_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy keras_lora keras_lora_cli tests examples benchmarks docs

test-tensorflow: $(VENV)/.dev
	$(BIN)/python tests/run.py

# The invariants of the layers, copies, training and resuming, on the two other backends.
BACKEND_TESTS := tests/test_layers.py tests/test_starts.py tests/test_starts_data.py tests/test_dora.py \
	tests/test_dora_models.py tests/test_training.py tests/test_choosing.py tests/test_rematerialized.py tests/test_recurrent.py \
	tests/test_rematerialize.py \
	tests/test_chunks.py::test_a_compiled_step tests/test_chunks.py::test_no_logits_are_whole \
	tests/test_chunks.py::test_metrics_are_those_of_whole_logits \
	tests/test_variables.py::test_an_adapted_layer_is_a_plain_one_with_the_effective_matrices \
	tests/test_variables.py::test_training_follows_the_gradient_of_the_matrices \
	tests/test_rates.py::test_each_variable_moves_as_by_the_plain_optimizer_at_its_own_rate \
	tests/test_rates.py::test_fit_moves_each_group_at_its_rate \
	tests/test_quantized.py::test_the_gradient_of_a_quantized_reverse_is_that_of_floating_point \
	tests/test_quantized.py::test_dora_on_a_quantized_base_equals_the_reference \
	tests/test_quantized.py::test_low_precision \
	tests/test_train_tokens.py::test_the_rows_of_the_tokens_are_replaced_and_no_others \
	tests/test_train_tokens.py::test_only_these_rows_train_and_as_in_a_model_that_trains_the_whole_matrix \
	tests/test_copies.py::test_a_copy_preprocesses_as_its_original \
	tests/test_checkpoint.py::test_a_broken_run_goes_on_to_the_weights_and_logs_of_an_unbroken_one
test-backends: $(VENV)/.dev
	KERAS_BACKEND=jax $(BIN)/python tests/run.py tests/devices tests/test_hlo.py $(BACKEND_TESTS)
	KERAS_BACKEND=torch $(BIN)/python tests/run.py $(BACKEND_TESTS)

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --quiet

# Of every architecture, what PEFT's adapters can be; a test compares the page with it.
architectures: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python docs/architectures.py

# Which kind of layer takes which option; a test compares the page with it.
support: $(VENV)/.dev
	$(BIN)/python docs/support_matrix.py

# What models of up to 70 billion parameters would take; some twenty minutes.
predictions: $(VENV)/.dev
	$(BIN)/python docs/predictions.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/convolutions.py
	$(BIN)/python benchmarks/injection.py
	$(BIN)/python benchmarks/merged.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/saved_model.py
	$(BIN)/python benchmarks/recurrent.py
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) .assets dist site

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Without `--no-compile`, two minutes go into compiling modules, of which few are ever imported.
INSTALL := $(BIN)/pip install --quiet --no-compile --editable

$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	$(INSTALL) ".[nlp]"
	touch $@

$(VENV)/.plot: pyproject.toml | $(BIN)/pip
	$(INSTALL) ".[plot]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	$(INSTALL) ".[dev]"
	touch $@
