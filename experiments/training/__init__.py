"""The training loop of all experiments, with its options, run folders and data loading.

What a single task adds to it, its nets and its images, belongs to the room of that task.
"""
