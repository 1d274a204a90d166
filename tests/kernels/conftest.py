import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed():
    """The problems are small: threads would cost more than they bring, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
