# shellcheck shell=bash
# Sourced, not run: options of the TPU compiler under which a step sends what the formula of its parallelism says.
#
#   source launch/tpu_flags.sh
#   lmx plan configs/llama.py:llama_8b --topology v5p:4x4x4 --mesh.fsdp 64 --formulas True
#
# They were chosen by compiling for v5p slices of 8, 64 and 512 chips. None of them was run on a TPU.
flags=(
    # Without these, parameters that are gathered over a large slice come by an all-reduce, which sends twice as much.
    --xla_tpu_prefer_async_allgather_to_allreduce=true
    --xla_enable_async_all_gather=true
    --xla_tpu_enable_async_collective_fusion=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    # Without these, so do gradients that are reduced and scattered. The SparseCores do it.
    --xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true
    --xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter=true
    --xla_tpu_check_legacy_constraints_in_reduce_scatter_legalizer=false
    # Products taken apart to overlap with a gather pass on one part too many in each of two directions.
    --xla_tpu_enable_windowed_einsum_for_all_gather=false
    --xla_tpu_enable_windowed_einsum_for_reduce_scatter=false
)
export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:+$LIBTPU_INIT_ARGS }${flags[*]}"
unset flags
