"""What the processes run on: device, process groups, seeds, logs, and the one file that patches Megatron."""
