# Puts everything that grows on the data volume of a machine whose system disk is small (rented pods have 5 GB).
#
#   source launch/env.sh /workspace         in every shell, or as the first line of a job script
#
# Caches of models, packages and compilers, temporary files and wandb's files go below VOLUME; `runs`, `data`, `shards`
# and `demo` in this repository become links to folders there, unless they exist. Nothing is moved, nothing is deleted.
# Keep the repository itself on the volume too: its .venv with CUDA packages is several GB.

_fvlm_env() {
  local volume=$1 repository folder variable
  if [ -z "$volume" ] || [ ! -d "$volume" ] || [ ! -w "$volume" ]; then
    echo "env.sh: VOLUME = '$volume': expected a writable folder, e.g. source launch/env.sh /workspace" >&2
    return 2
  fi
  volume=$(cd "$volume" && pwd) || return 1
  repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
  export HF_HOME=$volume/cache/huggingface TORCH_HOME=$volume/cache/torch XDG_CACHE_HOME=$volume/cache
  export PIP_CACHE_DIR=$volume/cache/pip UV_CACHE_DIR=$volume/cache/uv
  export TRITON_CACHE_DIR=$volume/cache/triton TORCHINDUCTOR_CACHE_DIR=$volume/cache/inductor
  export TORCH_EXTENSIONS_DIR=$volume/cache/torch_extensions CUDA_CACHE_PATH=$volume/cache/cuda
  export MPLCONFIGDIR=$volume/cache/matplotlib
  export WANDB_DIR=$volume/wandb WANDB_CACHE_DIR=$volume/cache/wandb WANDB_DATA_DIR=$volume/wandb/data
  export TMPDIR=$volume/tmp RAY_TMPDIR=$volume/tmp
  for variable in HF_HOME TORCH_HOME PIP_CACHE_DIR UV_CACHE_DIR TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR \
    TORCH_EXTENSIONS_DIR CUDA_CACHE_PATH MPLCONFIGDIR WANDB_DIR WANDB_CACHE_DIR WANDB_DATA_DIR TMPDIR; do
    mkdir -p "${!variable}" || return 1
  done
  for folder in runs shards data demo; do
    mkdir -p "$volume/$folder" || return 1
    if [ -L "$repository/$folder" ] || [ ! -e "$repository/$folder" ]; then
      ln -sfn "$volume/$folder" "$repository/$folder" || return 1
    elif [ ! "$repository/$folder" -ef "$volume/$folder" ]; then
      echo "env.sh: $repository/$folder is a folder of its own and stays; move it to $volume to free its disk" >&2
    fi
  done
  echo "env.sh: caches, temporary files and runs are on $volume ($(df -h --output=avail "$volume" | tail -1 | tr -d ' ') free)"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  echo "env.sh: it sets variables of your shell: source launch/env.sh VOLUME" >&2
  exit 2
fi
_fvlm_env "$1"
