"""p828 trains SampleOrder-of-Experts language models from scratch."""
