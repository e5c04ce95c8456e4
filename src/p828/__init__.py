"""p828 trains Mixture-of-Experts language models from scratch."""
