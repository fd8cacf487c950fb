"""Weights from TRL to a vLLM server without NCCL, which a machine without a GPU lacks: through a store on TCP.

vLLM loads :func:`register` as a plugin in each process of the server; :func:`patch_trl` is the trainer's side.
"""

from __future__ import annotations


def _group(info, rank):
    from vllm.distributed.utils import StatelessProcessGroup

    read = info.get if isinstance(info, dict) else lambda name: getattr(info, name)
    place = {"host": read("master_address"), "port": read("master_port")}
    return StatelessProcessGroup.create(**place, rank=rank, world_size=read("world_size"))


def keep_linear_layers():
    """Have vLLM not pack linear layers for oneDNN, which drops their parameters: none could be loaded again."""
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False


def register():
    keep_linear_layers()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    class StoreEngine(NCCLWeightTransferEngine):
        def init_transfer_engine(self, info):
            self.model_update_group = _group(info, self.parallel_config.rank + info.rank_offset)

        def receive_weights(self, update):
            for name in update.names:
                self.model.load_weights([(name, self.model_update_group.broadcast(None, src=0))])

    if "store" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("store", StoreEngine)


class _Sender:
    """Stands in for vLLM's NCCLWeightTransferEngine in TRL's client."""

    @staticmethod
    def trainer_init(info):
        return _group(info, 0)

    @staticmethod
    def trainer_send_weights(iterator, trainer_args):
        for _, tensor in iterator:
            trainer_args.group.broadcast(tensor.detach().clone(), src=0)


def patch_trl():
    import trl.generation.vllm_client as client

    client.NCCLWeightTransferEngine = _Sender
    initialise = client.VLLMClient.init_communicator
    # It refuses any device but CUDA, and uses it for NCCL alone.
    client.VLLMClient.init_communicator = lambda self, device=0: initialise(self, "cuda")
    client.VLLMClient.close_communicator = lambda self: setattr(self, "communicator", None)
