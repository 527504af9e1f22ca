# What one cluster needs before Python starts. Copy to slurm/env/<cluster>.sh, edit, and pass it:
#   moetrain launch slurm --env-file slurm/env/<cluster>.sh ...
# It is sourced by the batch shell; what it exports reaches every rank.

# module purge
# module load gcc cuda

# The network interface of the compute fabric, for the backend that you use.
# export GLOO_SOCKET_IFNAME=eth0
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# Threads per rank with GPUs. On CPU the CPUs of a node are divided among its ranks, or set runtime.cpu_threads.
# export OMP_NUM_THREADS=8

# CPU training: let malloc keep freed pages, which saves page faults in every step.
# export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
