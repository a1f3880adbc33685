"""What a run takes, by formula: memory, time and money, without torch or a GPU. In the order to read it:

hardware, hardware.yaml  what GPUs hold, compute, pass on and draw, each number with its source
sizes                    a model's parameters, and the FLOPs of a token
memory                   bytes on one GPU by part, under DDP, FSDP2 and HSDP; the largest micro-batch that fits
cost                     seconds of a step, what the network adds, hours, dollars, kWh
"""
