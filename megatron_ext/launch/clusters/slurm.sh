# What a site needs stands here: modules, the interface of the network. The user's own values win.
# module load cuda
# export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME-ib0}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS-8}"
