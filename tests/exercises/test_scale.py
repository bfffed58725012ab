"""Attention without 1/sqrt(d), in training and in evaluation."""
import torch

from transformer import attention, fast_attention


def test_scores_are_not_divided_by_the_root_of_the_head_size():
    torch.manual_seed(0)
    for T, S in ((1, 1), (7, 7), (1, 9), (40, 40)):
        q, k, v = torch.randn(2, 4, T, 32), torch.randn(2, 2, S, 32), torch.randn(2, 2, S, 32)
        scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
        scores = scores + torch.full((T, S), float("-inf")).triu(S - T + 1)
        expected = torch.softmax(scores, -1) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(attention(q, k, v), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(fast_attention(q, k, v), expected, atol=1e-5, rtol=1e-4)
