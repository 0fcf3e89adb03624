"""The routed model for transformers' Auto classes: the remote code of an exported folder.

    AutoModelForCausalLM.from_pretrained("out/export", trust_remote_code=True).generate(**inputs)

extras/export.py copies this file, model_ftp.py and what that reads into the folder, all side by
side. It generates what FTPModel does, token for token.
"""
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from model_ftp import FTPModel

NEW_TOKENS = 64      # where neither the call nor generation_config.json says how many


class FTPForCausalLM(PreTrainedModel):
    """A routed FTPModel behind the face of transformers; `ftp` is the FTPModel itself."""

    def __init__(self, config, ftp):
        super().__init__(config)
        self.ftp = ftp

    @classmethod
    def from_pretrained(cls, path, *_, config=None, dtype=None, torch_dtype=None, device_map=None,
                        **unused):
        """The folder's model, routed as its ftp/ says. dtype, torch_dtype: as elsewhere, "auto" is
        the dtype of config.json. device_map: one device."""
        dtype = dtype or torch_dtype or torch.float32
        if dtype == "auto":
            dtype = getattr(config, "dtype", None) or torch.float32
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        device = "cpu" if device_map in (None, "auto") else device_map
        if isinstance(device, dict):
            if list(device) != [""]:
                raise ValueError("device_map: this model lies on one device; give its name")
            device = device[""]
        model = cls(config, FTPModel.from_pretrained(str(path), dtype, str(device)))
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:                          # a folder without generation_config.json
            model.generation_config = GenerationConfig()
        return model.eval()

    def forward(self, input_ids, attention_mask=None, **unused):
        """Logits of the dense model. While a schedule is in use FTPModel refuses: inside a routed
        prompt no logits are causal. ftp.use() alone makes it dense."""
        return CausalLMOutput(logits=self.ftp(input_ids, attention_mask))

    @torch.no_grad()
    def generate(self, inputs=None, attention_mask=None, input_ids=None, max_new_tokens=None,
                 max_length=None, do_sample=False, temperature=None, top_p=None, eos_token_id=None,
                 pad_token_id=None, **unknown):
        """Token ids (B, T + new): the prompts as given, what follows, pads behind shorter answers.

        input_ids (B, T), pads on either side where attention_mask (B, T) is 0. Greedy, or with
        do_sample by temperature and top_p. ValueError on options that FTPModel has not.
        """
        if unknown:
            raise ValueError(f"generate() of a routed model has no {', '.join(sorted(unknown))}")
        ids = inputs if input_ids is None else input_ids
        real = torch.ones_like(ids) if attention_mask is None else attention_mask
        prompts = [row[m.bool()].tolist() for row, m in zip(ids, real)]
        defaults = self.generation_config
        if max_new_tokens is None:
            given = defaults.max_new_tokens or NEW_TOKENS
            max_new_tokens = given if max_length is None else max_length - ids.shape[1]
        how = {}
        if do_sample:
            # as torch.manual_seed() says, like every other generate()
            how = {"temperature": temperature or defaults.temperature or 1.0,
                   "top_p": top_p or defaults.top_p or 1.0,
                   "seed": int(torch.randint(2 ** 31, ()))}
        eos = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
        new = self.ftp.generate(prompts, max_new_tokens, eos=eos, **how)

        # one rectangle again
        ends = tuple(self.ftp.config.eos if eos is None else eos)
        pad = next(t for t in (pad_token_id, defaults.pad_token_id, *ends, 0) if t is not None)
        tail = ids.new_full((len(new), max(map(len, new))), pad)
        for row, tokens in zip(tail, new):
            row[:len(tokens)] = torch.tensor(tokens)
        return torch.cat((ids, tail), 1)
