# MemControl with PostgreSQL's driver and Ray, as a user of its own. TORCH_INDEX chooses the build of torch: CUDA 12.8 here,
# https://download.pytorch.org/whl/cpu for machines without a GPU.
FROM python:3.11.14-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive

# the folder that a volume is mounted over gives it its owner
RUN useradd --create-home --uid 1000 memcontrol && install -d -o memcontrol -g memcontrol /home/memcontrol/.cache
WORKDIR /opt/memcontrol
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY memcontrol memcontrol
COPY search_spaces search_spaces
RUN pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" torch \
    && pip install -c constraints.txt '.[postgresql,ray]'

USER memcontrol
WORKDIR /work
ENTRYPOINT ["memcontrol"]
CMD ["--help"]
