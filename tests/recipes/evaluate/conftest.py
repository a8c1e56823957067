"""A script that needs PyTorch lies beside the tests that run it."""

collect_ignore = ['plain_torch.py']
