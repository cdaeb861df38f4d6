# docker build -t albert_ablate . && docker run --rm -v "$PWD/runs:/work/runs" albert_ablate run norm=pre_ln
# Without a GPU: --build-arg TORCH_INDEX=URL, the address of PyTorch's CPU builds, saves several GB.
FROM python:3.11-slim
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.9,<2.14"
COPY . /opt/albert_ablate
RUN pip install --no-cache-dir "/opt/albert_ablate[plot]"
WORKDIR /work
ENTRYPOINT ["albert-ablate"]
CMD ["--help"]
