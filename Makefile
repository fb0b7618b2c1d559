# make demo   generate garments.png with the built-in model; needs Python and the package index
# make test   install everything, build the wheel and run the tests against it
# make check  what CI runs beside the tests: lint, types, NumPy 1.26
# make dev    an editable install to work in
# make ptx    compile the kernels of the loop on the GPU again

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One pinned set of versions for whoever tests; the demo takes what the index has.
PINNED := -c constraints.txt
# The tests' networks are tiny: torch's threads would mostly wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1

# The tests run the kernels of the loop on the GPU compiled for the CPU.
COMPILER = command -v c++ > /dev/null || $(1)/pip install --quiet $(PINNED) ziglang

.PHONY: demo test dev check lint numpy1 ptx retrain clean

demo: $(BIN)/python
	$(BIN)/pip install --quiet '.[cpu]'
	$(BIN)/ddpm-edge sample -n 16 -o garments.png

test: $(BIN)/python
	$(BIN)/pip install --quiet $(PINNED) build
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/pip install --quiet $(PINNED) "$$(ls dist/*.whl)[cpu,export,dev]"
	$(BIN)/pip install --quiet $(PINNED) --no-deps --force-reinstall dist/*.whl
	$(call COMPILER,$(BIN))
	$(ONE_THREAD) $(BIN)/pytest

dev: $(BIN)/python
	$(BIN)/pip install $(PINNED) -e '.[cpu,export,dev]'

check: lint numpy1

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p ddpm_edge

# The oldest NumPy that is supported, without torch, onnx or diffusers: what a Jetson has. With
# PYTHON=python3.10 it is JetPack 6's Python as well.
numpy1:
	$(PYTHON) -m venv $(VENV)-numpy1
	$(VENV)-numpy1/bin/pip install --quiet 'numpy==1.26.4' pytest "$$(ls dist/*.whl)[cpu]"
	$(VENV)-numpy1/bin/pip install --quiet --no-deps --force-reinstall dist/*.whl
	$(call COMPILER,$(VENV)-numpy1/bin)
	$(VENV)-numpy1/bin/pytest -q tests/test_noise.py tests/test_schedule.py tests/test_samplers.py \
		tests/test_grid.py tests/test_phi.py tests/test_one_step.py tests/test_dpm_solver.py \
		tests/test_unipc.py tests/test_ipndm.py tests/test_predictor_corrector.py \
		tests/test_metrics.py tests/test_plan.py tests/test_bundle.py tests/test_generator.py \
		tests/test_tasks.py tests/test_restoration.py tests/test_time_travel.py \
		tests/test_inversion.py tests/test_inputs.py tests/test_cli.py tests/test_verify.py \
		tests/test_bench.py tests/test_quality.py tests/test_runtimes.py tests/test_trt.py \
		tests/test_engine_cache.py tests/test_doctor.py tests/test_without_gpu.py \
		tests/test_choice.py tests/test_tune.py tests/test_device_loop.py tests/test_resident.py

ptx:
	$(BIN)/python tests/nvrtc.py ddpm_edge/step.cu > ddpm_edge/step.ptx

# The built-in bundle again: about 95 minutes on two cores, minutes on a GPU.
retrain: dev
	$(BIN)/ddpm-edge train --data fashion-mnist --preset small --steps 9587 --batch 64 --seed 0 \
		-o runs/fashion-mnist
	$(BIN)/ddpm-edge export runs/fashion-mnist -o ddpm_edge/bundles/fashion-mnist \
		--licence Apache-2.0 --gate full
	$(BIN)/ddpm-edge tune --data fashion-mnist -n 2000 -o ddpm_edge/bundles/fashion-mnist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(VENV)-numpy1 build dist *.egg-info
