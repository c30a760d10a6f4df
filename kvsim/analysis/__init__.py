"""Questions asked of memory and latency: plans, break-even, sweeps, explanations, boot logs."""
