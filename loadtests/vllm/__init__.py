"""kvlane over a real vLLM beside a bare `vllm serve` with the same engine settings."""
