"""Promises of architectures: on the real keys of ComfyUI's own models each is found, and keeps what it must keep."""

import importlib
import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from tessera.checkpoint import Checkpoint
from tessera.formats import BF16, MXFP8, NVFP4
from tessera.quantization import architecture, recipe
from tessera.quantization.architecture import detect, safe_defaults

GENERIC = ("nvfp4", "mxfp8", "int8")

# ---- ComfyUI's models at their real sizes, on the meta device

LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "qk_norm": True, "dim": 2304, "cap_feat_dim": 2304,
    "n_layers": 26, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
}  # fmt: skip
ZIMAGE = LUMINA | {
    "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = FLUX | {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 15360,
    "hidden_size": 6144, "mlp_ratio": 3.0, "num_heads": 48, "depth": 8, "depth_single_blocks": 48,
    "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1, "qkv_bias": False, "global_modulation": True,
    "mlp_silu_act": True, "ops_bias": False, "txt_ids_dims": [3],
}  # fmt: skip
KLEIN = FLUX2 | {"hidden_size": 3072, "num_heads": 24, "context_in_dim": 7680, "guidance_embed": False, "depth": 5,
                 "depth_single_blocks": 20}  # fmt: skip
CHROMA = {k: v for k, v in FLUX.items() if k != "guidance_embed"} | {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "in_dim": 64, "out_dim": 3072,
    "hidden_dim": 5120, "n_layers": 5,
}  # fmt: skip
RADIANCE = CHROMA | {
    "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 64,
    "nerf_mlp_ratio": 4, "nerf_depth": 4, "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False,
}  # fmt: skip
QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}
WAN_SMALL = {"model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "out_dim": 16, "dim": 1536, "ffn_dim": 8960,
             "freq_dim": 256, "num_heads": 12, "num_layers": 30}  # fmt: skip
WAN = WAN_SMALL | {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
LTX2 = {"image_model": "ltxav", "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}
SD3 = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": 38, "adm_in_channels": 2048,
    "qk_norm": "rms", "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}},
}  # fmt: skip
SDXL = {
    "image_size": 32, "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential",
    "adm_in_channels": 2816, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "channel_mult": [1, 2, 4], "transformer_depth_middle": 10, "use_linear_in_transformer": True, "context_dim": 2048,
    "num_head_channels": 64,
}  # fmt: skip
SD15 = SDXL | {
    "num_classes": None, "adm_in_channels": None, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": 768, "num_heads": 8,
    "num_head_channels": -1,
}  # fmt: skip
HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 768,
    "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 20,
    "depth_single_blocks": 40, "axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True, "guidance_embed": True,
    "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 2048, "num_blocks": 28, "num_heads": 16, "concat_padding_mask": True,
    "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "use_adaln_lora": True,
    "adaln_lora_dim": 256, "extra_per_block_abs_pos_emb": False,
}  # fmt: skip

LUMINA_CLASS, FLUX_CLASS, WAN_MODULE = "lumina.model.NextDiT", "flux.model.Flux", "wan.model"
MMDIT = "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper"
UNET = "modules.diffusionmodules.openaimodel.UNetModel"
QWEN_CLASS, LTX_CLASS = "qwen_image.model.QwenImageTransformer2DModel", "lightricks.av_model.LTXAVModel"
MODELS = {  # our name -> (our architecture, ComfyUI's supported model, class below comfy.ldm, its configuration)
    "z_image": ("z_image", "ZImage", LUMINA_CLASS, ZIMAGE),
    "z_image_omni": ("z_image", "ZImage", LUMINA_CLASS, ZIMAGE | {"siglip_feat_dim": 1152}),
    "lumina2": ("lumina2", "Lumina2", LUMINA_CLASS, LUMINA),
    "newbie": ("lumina2", "Lumina2", LUMINA_CLASS, LUMINA | {"clip_text_dim": 1024, "n_layers": 36}),
    "flux_dev": ("flux", "Flux", FLUX_CLASS, FLUX),
    "flux_schnell": ("flux", "FluxSchnell", FLUX_CLASS, FLUX | {"guidance_embed": False}),
    "flux_fill": ("flux", "FluxInpaint", FLUX_CLASS, FLUX | {"in_channels": 96}),
    "longcat_image": ("flux", "LongCatImage", FLUX_CLASS,
                      FLUX | {"guidance_embed": False, "vec_in_dim": None, "context_in_dim": 3584, "depth": 10,
                              "depth_single_blocks": 20}),
    "ovis_image": ("flux", "FluxSchnell", FLUX_CLASS,
                   FLUX | {"guidance_embed": False, "vec_in_dim": None, "context_in_dim": 2048, "depth": 6,
                           "depth_single_blocks": 27, "yak_mlp": True, "txt_norm": True}),
    "flux2_dev": ("flux2", "Flux2", FLUX_CLASS, FLUX2),
    "flux2_klein_4b": ("flux2", "Flux2", FLUX_CLASS, KLEIN),
    "flux2_klein_9b": ("flux2", "Flux2", FLUX_CLASS,
                       KLEIN | {"hidden_size": 4096, "num_heads": 32, "context_in_dim": 12288, "depth": 8,
                                "depth_single_blocks": 24}),
    "chroma": ("chroma", "Chroma", "chroma.model.Chroma", CHROMA),
    "chroma_radiance": ("chroma", "ChromaRadiance", "chroma_radiance.model.ChromaRadiance", RADIANCE),
    "qwen_image": ("qwen_image", "QwenImage", QWEN_CLASS, QWEN),
    "qwen_image_layered": ("qwen_image", "QwenImage", QWEN_CLASS, QWEN | {"use_additional_t_cond": True}),
    "wan21_t2v_1b": ("wan", "WAN21_T2V", f"{WAN_MODULE}.WanModel", WAN_SMALL),
    "wan21_t2v_14b": ("wan", "WAN21_T2V", f"{WAN_MODULE}.WanModel", WAN),
    "wan21_i2v_14b": ("wan", "WAN21_I2V", f"{WAN_MODULE}.WanModel", WAN | {"model_type": "i2v", "in_dim": 36}),
    "wan22_ti2v_5b": ("wan", "WAN22_T2V", f"{WAN_MODULE}.WanModel",
                      WAN | {"in_dim": 48, "out_dim": 48, "dim": 3072, "ffn_dim": 14336, "num_heads": 24,
                             "num_layers": 30}),
    "wan21_vace_14b": ("wan", "WAN21_Vace", f"{WAN_MODULE}.VaceWanModel",
                       WAN | {"model_type": "vace", "vace_layers": 8, "vace_in_dim": 96}),
    "wan21_camera": ("wan", "WAN21_Camera", f"{WAN_MODULE}.CameraWanModel",
                     WAN | {"model_type": "camera", "in_dim": 32}),
    "wan22_s2v": ("wan", "WAN22_S2V", f"{WAN_MODULE}.WanModel_S2V", WAN | {"model_type": "s2v"}),
    "wan22_animate": ("wan", "WAN22_Animate", "wan.model_animate.AnimateWanModel",
                      WAN | {"model_type": "animate", "in_dim": 36}),
    "wan21_humo": ("wan", "WAN21_HuMo", f"{WAN_MODULE}.HumoWanModel", WAN | {"model_type": "humo", "in_dim": 36}),
    "wan22_dancer": ("wan", "WAN22_WanDancer", "wan.model_wandancer.WanDancerModel",
                     WAN | {"model_type": "wandancer", "in_dim": 36}),
    "ltxv_2b": ("ltxv", "LTXV", "lightricks.model.LTXVModel",
                {"image_model": "ltxv", "num_layers": 28, "attention_head_dim": 64, "cross_attention_dim": 2048}),
    "ltxv_13b": ("ltxv", "LTXV", "lightricks.model.LTXVModel",
                 {"image_model": "ltxv", "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}),
    "ltx2": ("ltx2", "LTXAV", LTX_CLASS, LTX2),
    "ltx2_3": ("ltx2", "LTXAV", LTX_CLASS,
               LTX2 | {"apply_gated_attention": True, "caption_proj_before_connector": True,
                       "cross_attention_adaln": True}),
    "sd35_large": ("sd3", "SD3", MMDIT, SD3),
    "sd35_medium": ("sd3", "SD3", MMDIT,
                    SD3 | {"depth": 24, "x_block_self_attn_layers": list(range(13)),
                           "context_embedder_config": {"target": "torch.nn.Linear",
                                                       "params": {"in_features": 4096, "out_features": 1536}}}),
    "sdxl": ("sdxl", "SDXL", UNET, SDXL),
    "ssd_1b": ("sdxl", "SSD1B", UNET,
               SDXL | {"transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_middle": -1,
                       "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4]}),
    "koala_700m": ("sdxl", "KOALA_700M", UNET,
                   SDXL | {"num_res_blocks": [1, 1, 1], "transformer_depth": [0, 2, 5],
                           "transformer_depth_middle": -2, "transformer_depth_output": [0, 0, 2, 2, 5, 5]}),
    "sd15": ("unknown", "SD15", UNET, SD15),
    "hunyuan_video": ("unknown", "HunyuanVideo", "hunyuan_video.model.HunyuanVideo", HUNYUAN),
    "cosmos_predict2": ("unknown", "CosmosT2IPredict2", "cosmos.predict2.MiniTrainDIT", COSMOS),
    "aura_flow": ("unknown", "AuraFlow", "aura.mmdit.MMDiT",
                  {"max_seq": 4096, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36}),
}  # fmt: skip
ENCODERS = {  # our name -> (our architecture, ComfyUI's TEModel, class below comfy.text_encoders, configuration file)
    "qwen3_4b": ("qwen3", "QWEN3_4B", "llama.Qwen3_4B", None),
    "qwen3_8b": ("qwen3", "QWEN3_8B", "llama.Qwen3_8B", None),
    "qwen3_06b": ("qwen3", "QWEN3_06B", "llama.Qwen3_06B", None),
    "qwen3vl_8b": ("qwen3", "QWEN3VL_8B", "qwen3vl.Qwen3VL", None),
    "qwen25_7b": ("llama", "QWEN25_7B", "llama.Qwen25_7BVLI", None),
    "llama3_8b": ("llama", "LLAMA3_8", "llama.Llama2", None),
    "mistral3_24b": ("llama", "MISTRAL3_24B", "llama.Mistral3Small24B", None),
    "gemma2_2b": ("gemma", "GEMMA_2_2B", "llama.Gemma2_2B", None),
    "gemma3_4b": ("gemma", "GEMMA_3_4B_VISION", "llama.Gemma3_4B_Vision", None),
    "gemma3_12b": ("gemma", "GEMMA_3_12B", "llama.Gemma3_12B", None),
    "gemma4_e4b": ("gemma", "GEMMA_4_E4B", "gemma4.Gemma4_E4B", None),
    "gemma4_12b": ("gemma", "GEMMA_4_12B", "gemma4.Gemma4_12B", None),
    "t5_xxl": ("t5", "T5_XXL", "t5.T5", "t5_config_xxl.json"),
    "t5_xxl_old": ("t5", "T5_XXL_OLD", "t5.T5", "t5_old_config_xxl.json"),
    "umt5_xxl": ("t5", "T5_XXL", "t5.T5", "umt5_config_xxl.json"),
    "t5_base": ("t5", "T5_BASE", "t5.T5", "t5_config_base.json"),
    "byt5_small": ("t5", "BYT5_SMALL_GLYPH", "t5.T5", "byt5_config_small_glyph.json"),
}  # fmt: skip
ALL = {**MODELS, **ENCODERS}
KNOWN = [name for name, (ours, *_) in ALL.items() if ours != "unknown"]

EXPECTED = {  # what must be kept; what must be packed; what needs 8 bits
    "z_image": ("cap_embedder.1 x_embedder t_embedder.mlp.0 t_embedder.mlp.2 final_layer.linear "
                "final_layer.adaLN_modulation.1 layers.3.adaLN_modulation.0 noise_refiner.1.adaLN_modulation.0",
                "layers.0.attention.qkv layers.29.feed_forward.w2 context_refiner.0.attention.out "
                "noise_refiner.1.feed_forward.w3", ""),
    "z_image_omni": ("siglip_embedder.1", "siglip_refiner.0.attention.qkv", ""),
    "lumina2": ("cap_embedder.1 layers.0.adaLN_modulation.1 final_layer.linear x_embedder",
                "layers.25.attention.qkv context_refiner.1.feed_forward.w1", ""),
    "newbie": ("clip_text_pooled_proj.1 time_text_embed.1", "layers.35.feed_forward.w2", ""),
    "flux_dev": ("img_in txt_in vector_in.in_layer vector_in.out_layer time_in.in_layer guidance_in.out_layer "
                 "final_layer.linear final_layer.adaLN_modulation.1",
                 "double_blocks.0.img_attn.qkv double_blocks.18.txt_mlp.2 single_blocks.0.linear1 "
                 "single_blocks.37.linear2",
                 "double_blocks.0.img_mod.lin double_blocks.18.txt_mod.lin single_blocks.37.modulation.lin"),
    "ovis_image": ("img_in txt_in", "double_blocks.0.img_mlp.gate_proj single_blocks.26.linear2",
                   "single_blocks.26.modulation.lin"),
    "flux2_dev": ("img_in txt_in time_in.in_layer guidance_in.in_layer double_stream_modulation_img.lin "
                  "double_stream_modulation_txt.lin single_stream_modulation.lin final_layer.linear",
                  "double_blocks.0.img_mlp.0 double_blocks.7.txt_attn.proj single_blocks.47.linear2", ""),
    "flux2_klein_9b": ("single_stream_modulation.lin txt_in", "single_blocks.23.linear1", ""),
    "chroma": ("img_in txt_in final_layer.linear distilled_guidance_layer.in_proj "
               "distilled_guidance_layer.layers.4.out_layer",
               "double_blocks.18.img_attn.qkv single_blocks.37.linear1", ""),
    "chroma_radiance": ("nerf_image_embedder.embedder.0 nerf_blocks.3.param_generator",
                        "double_blocks.0.txt_mlp.0", ""),
    "qwen_image": ("img_in txt_in norm_out.linear proj_out time_text_embed.timestep_embedder.linear_1 "
                   "transformer_blocks.0.img_mod.1",
                   "transformer_blocks.0.attn.to_q transformer_blocks.59.attn.to_add_out "
                   "transformer_blocks.59.txt_mlp.net.2 transformer_blocks.1.img_mlp.net.0.proj",
                   "transformer_blocks.0.txt_mod.1 transformer_blocks.59.img_mod.1"),
    "qwen_image_layered": ("time_text_embed.addition_t_embedding", "transformer_blocks.0.attn.to_q", ""),
    "wan21_t2v_14b": ("text_embedding.0 text_embedding.2 time_embedding.0 time_projection.1 head.head blocks.0.ffn.0",
                      "blocks.0.self_attn.q blocks.39.cross_attn.o blocks.0.ffn.2 blocks.1.ffn.0", ""),
    "wan21_i2v_14b": ("img_emb.proj.1 img_emb.proj.3", "blocks.0.cross_attn.k_img blocks.39.cross_attn.v_img", ""),
    "wan21_vace_14b": ("vace_blocks.0.before_proj", "vace_blocks.7.ffn.0 vace_blocks.0.after_proj", ""),
    "wan22_s2v": ("audio_injector.injector.0.q casual_audio_encoder.encoder.final_linear trainable_cond_mask",
                  "blocks.3.self_attn.v", ""),
    "wan22_animate": ("face_adapter.fuser_blocks.0.linear1_kv motion_encoder.dec.direction face_encoder.out_proj",
                      "blocks.39.ffn.2", ""),
    "wan21_humo": ("audio_proj.audio_proj_glob_1.layer", "blocks.0.audio_cross_attn_wrapper.audio_cross_attn.q", ""),
    "wan22_dancer": ("music_projection head_global.head music_injector.injector.0.q", "blocks.5.ffn.0", ""),
    "ltxv_13b": ("patchify_proj proj_out adaln_single.linear caption_projection.linear_1 "
                 "transformer_blocks.0.attn2.to_k",
                 "transformer_blocks.0.attn1.to_k transformer_blocks.1.attn2.to_k transformer_blocks.47.ff.net.2", ""),
    "ltx2": ("patchify_proj audio_patchify_proj audio_proj_out proj_out transformer_blocks.0.attn2.to_k "
             "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q av_ca_a2v_gate_adaln_single.linear "
             "audio_adaln_single.emb.timestep_embedder.linear_2 audio_caption_projection.linear_1",
             "transformer_blocks.0.audio_attn1.to_q transformer_blocks.47.audio_to_video_attn.to_out.0 "
             "transformer_blocks.1.audio_ff.net.0.proj", ""),
    "ltx2_3": ("transformer_blocks.3.attn1.to_gate_logits transformer_blocks.47.audio_to_video_attn.to_gate_logits "
               "prompt_adaln_single.linear", "transformer_blocks.47.attn1.to_v", ""),
    "sd35_large": ("context_embedder y_embedder.mlp.0 t_embedder.mlp.2 final_layer.linear",
                   "joint_blocks.0.x_block.attn.qkv joint_blocks.37.context_block.attn.qkv "
                   "joint_blocks.37.x_block.mlp.fc2",
                   "joint_blocks.0.x_block.adaLN_modulation.1 joint_blocks.37.context_block.adaLN_modulation.1"),
    "sd35_medium": ("context_embedder", "joint_blocks.12.x_block.attn2.qkv",
                    "joint_blocks.0.x_block.adaLN_modulation.1"),
    "sdxl": ("time_embed.0 label_emb.0.2 input_blocks.4.1.transformer_blocks.0.attn2.to_k middle_block.0.emb_layers.1 "
             "output_blocks.2.1.proj_out input_blocks.7.1.proj_in output_blocks.8.0.emb_layers.1",
             "input_blocks.4.1.transformer_blocks.1.attn2.to_k middle_block.1.transformer_blocks.9.ff.net.0.proj "
             "output_blocks.0.1.transformer_blocks.0.attn1.to_out.0", ""),
    "ssd_1b": ("input_blocks.7.1.transformer_blocks.0.attn2.to_k", "input_blocks.7.1.transformer_blocks.3.attn2.to_k",
               ""),
    "qwen3_4b": ("model.embed_tokens", "model.layers.0.self_attn.q_proj model.layers.35.mlp.down_proj", ""),
    "qwen3_8b": ("model.embed_tokens model.lm_head", "model.layers.35.mlp.gate_proj", ""),
    "qwen3vl_8b": ("model.visual.merger.linear_fc2 model.visual.blocks.3.attn.qkv lm_head "
                   "model.language_model.embed_tokens", "model.language_model.layers.35.self_attn.o_proj", ""),
    "qwen25_7b": ("model.embed_tokens visual.blocks.0.mlp.gate_proj", "model.layers.27.mlp.up_proj", ""),
    "mistral3_24b": ("model.embed_tokens", "model.layers.39.self_attn.k_proj", ""),
    "gemma2_2b": ("model.embed_tokens", "model.layers.25.mlp.down_proj", ""),
    "gemma3_12b": ("model.embed_tokens vision_model.encoder.layers.0.mlp.fc1", "model.layers.47.self_attn.v_proj", ""),
    "gemma4_e4b": ("model.embed_tokens_per_layer model.per_layer_model_projection model.layers.0.per_layer_input_gate "
                   "model.layers.41.per_layer_projection audio_model.layers.0.self_attn.q_proj.linear "
                   "audio_projector.embedding_projection vision_model.patch_embedder.input_proj",
                   "model.layers.41.mlp.down_proj", ""),
    "t5_xxl": ("shared encoder.block.23.layer.1.DenseReluDense.wi_1 "
               "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
               "encoder.block.0.layer.0.SelfAttention.q encoder.block.23.layer.1.DenseReluDense.wo "
               "encoder.block.22.layer.1.DenseReluDense.wi_1", ""),
    "umt5_xxl": ("shared encoder.block.23.layer.0.SelfAttention.relative_attention_bias",
                 "encoder.block.23.layer.0.SelfAttention.k", ""),
    "byt5_small": ("encoder.block.0.layer.0.SelfAttention.k", "encoder.block.11.layer.1.DenseReluDense.wi_0", ""),
    "sd15": ("time_embed.0 input_blocks.1.0.emb_layers.1 input_blocks.1.1.transformer_blocks.0.attn2.to_k",
             "input_blocks.7.1.transformer_blocks.0.ff.net.0.proj "
             "output_blocks.5.1.transformer_blocks.0.attn1.to_q", ""),
    "hunyuan_video": ("txt_in.input_embedder time_in.in_layer final_layer.linear double_blocks.3.img_mod.lin "
                      "single_blocks.5.modulation.lin", "double_blocks.19.img_attn.qkv single_blocks.39.linear1", ""),
    "cosmos_predict2": ("x_embedder.proj.1 final_layer.linear blocks.3.adaln_modulation_self_attn.1 "
                        "blocks.0.mlp.layer1", "blocks.27.self_attn.q_proj blocks.5.mlp.layer2", ""),
    "aura_flow": ("init_x_linear final_linear modF.1 single_layers.3.modCX.1 double_layers.0.attn.w1q t_embedder.mlp.0",
                  "double_layers.3.attn.w1q single_layers.31.mlp.c_fc1", ""),
}  # fmt: skip

DOCUMENTED = {
    "z_image": "Z-Image",
    "lumina2": "Lumina Image 2.0",
    "flux_dev": "Flux.1 dev",
    "flux2_dev": "Flux.2 dev",
    "flux2_klein_4b": "Flux.2 klein 4B",
    "flux2_klein_9b": "Flux.2 klein 9B",
    "chroma": "Chroma",
    "qwen_image": "Qwen-Image",
    "wan22_ti2v_5b": "Wan 2.2 TI2V 5B",
    "wan21_t2v_14b": "Wan 2.1 and 2.2 T2V 14B, each",
    "wan21_vace_14b": "Wan 2.1 VACE 14B",
    "ltxv_13b": "LTX-Video 13B",
    "ltx2": "LTX-2",
    "sd35_large": "Stable Diffusion 3.5 Large",
    "sdxl": "Stable Diffusion XL (UNet)",
    "qwen3_4b": "Qwen3-4B",
    "qwen25_7b": "Qwen2.5-VL 7B",
    "gemma3_12b": "Gemma 3 12B",
    "t5_xxl": "T5 XXL (encoder)",
    "umt5_xxl": "UMT5 XXL (encoder)",
}
BUILT = {}


@pytest.fixture(scope="module")
def shapes_of(models):
    """The shapes of a model's tensors by name; each is built once, by ComfyUI's own class."""
    import comfy.ops

    def build(name):
        if name not in BUILT:
            _, _, path, config = ALL[name]
            package = "comfy.ldm" if name in MODELS else "comfy.text_encoders"
            module, _, cls = f"{package}.{path}".rpartition(".")
            kind, ops = getattr(importlib.import_module(module), cls), comfy.ops.disable_weight_init
            with torch.device("meta"):
                if name in MODELS:
                    model = kind(**config, dtype=torch.bfloat16, device="meta", operations=ops)
                else:
                    folder = Path(importlib.import_module(module).__file__).parent
                    options = json.loads((folder / config).read_text()) if config else {}
                    model = kind(options, torch.bfloat16, "meta", ops)
            BUILT[name] = {stored(name, key): tuple(t.shape) for key, t in model.state_dict().items()}
        return BUILT[name]

    return build


def stored(name, key):
    """The key in a file: ComfyUI renames those of Qwen3-VL when it loads one."""
    if name != "qwen3vl_8b":
        return key
    known = {"model.lm_head.": "lm_head.", "model.": "model.language_model.", "visual.": "model.visual."}
    ours = next(prefix for prefix in known if key.startswith(prefix))
    return known[ours] + key.removeprefix(ours)


class Shape(tuple):
    """A shape that tells when one of its sizes is read."""

    def __new__(cls, sizes, read):
        made = super().__new__(cls, sizes)
        made.read = read
        return made

    def __getitem__(self, index):
        self.read()
        return super().__getitem__(index)


class Spy:
    """Stands in for a tensor where only shapes matter: ComfyUI's detection reads no more of it."""

    def __init__(self, shape, read):
        self.shape = Shape(shape, read)

    def size(self, dim):
        return self.shape[dim]


def host_detects(name, shapes):
    """(what ComfyUI makes of the keys, the keys whose sizes it read)."""
    read = set()
    tensors = {key: Spy(shape, lambda key=key: read.add(key)) for key, shape in shapes.items()}
    if name in ENCODERS:
        import comfy.sd

        return comfy.sd.detect_te_model(tensors).name, read
    import comfy.model_detection as detection

    config = detection.detect_unet_config(tensors, "")
    return (type(detection.model_config_from_unet_config(config, tensors)).__name__, config), read


@cache
def resolved(name, generic):
    """The map of a generic recipe on a model that `shapes_of` has built."""
    return recipe.builtin(generic).resolve(BUILT[name])


def packed(shapes, layer_map):
    """The shapes of the file that a recipe makes."""
    formats = {f"{layer}.weight": choice.format for layer, choice in layer_map.items() if choice.format is not None}
    storage = {key: format.storage(*shapes[key])["weight"].shape for key, format in formats.items()}
    return shapes | storage


def weights(shapes, layers):
    return sum(math.prod(shapes[f"{layer}.weight"]) for layer in layers)


# ---- on the host's models


@pytest.mark.host
@pytest.mark.parametrize("name", KNOWN)
def test_keys_name_the_architecture_and_no_other(shapes_of, name):
    fitting = [known for known in architecture.names() if architecture.builtin(known).fits(shapes_of(name))]
    assert fitting == [ALL[name][0]]
    assert detect(shapes_of(name)).name == ALL[name][0]


@pytest.mark.host
@pytest.mark.parametrize("name", ALL)
def test_keys_are_those_that_comfyui_knows_the_model_by(shapes_of, name):
    found, _ = host_detects(name, shapes_of(name))
    assert (found if name in ENCODERS else found[0]) == ALL[name][1]


@pytest.mark.host
@pytest.mark.parametrize("name", ALL)
def test_nothing_that_detection_reads_is_packed(shapes_of, name):
    shapes = shapes_of(name)
    before, read = host_detects(name, shapes)
    for generic in GENERIC:
        layer_map = resolved(name, generic)
        if name in KNOWN:  # of an unknown one the first of each kind is kept, which is what detection goes by
            assert not [layer for layer in layer_map if f"{layer}.weight" in read and layer_map[layer].format]
        assert host_detects(name, packed(shapes, layer_map))[0] == before


@pytest.mark.host
@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_kept_and_what_is_packed(shapes_of, name):
    keep, pack, ease = (words.split() for words in EXPECTED[name])
    shapes_of(name)
    for generic, low, high in (("nvfp4", "nvfp4", "mxfp8"), ("mxfp8", "mxfp8", "mxfp8"), ("int8", "int8", "int8")):
        layer_map = resolved(name, generic)
        found = {layer: layer_map[layer].format and layer_map[layer].format.label for layer in (*keep, *pack, *ease)}
        assert found == {
            **dict.fromkeys(keep),
            **{n: f for n, f in found.items() if n in pack and f and f.startswith(low)},
            **{n: f for n, f in found.items() if n in ease and f and f.startswith(high)},
        }


@pytest.mark.host
@pytest.mark.parametrize("name", KNOWN)
def test_every_layer_of_a_known_model_has_a_reason_of_its_own(shapes_of, name):
    """The catch-all for what is outside the blocks decides nothing, and nothing is said but the reasons."""
    shapes_of(name)
    for generic in GENERIC:
        layer_map = resolved(name, generic)
        assert layer_map.architecture == ALL[name][0]
        assert (layer_map.warnings, layer_map.problems) == ([], [])
        assert not [layer for layer, choice in layer_map.items() if "outside" in choice.reason]


@pytest.mark.host
@pytest.mark.parametrize("name", ALL)
def test_most_weights_are_packed(shapes_of, name):
    shapes, layer_map = shapes_of(name), resolved(name, "nvfp4")
    linear = {layer for layer in layer_map if not re.search(r"embed_tokens|shared|visual|vision|audio", layer)}
    share = weights(shapes, [n for n in linear if layer_map[n].format is not None]) / weights(shapes, linear)
    assert share > (0.6 if ALL[name][0] == "unknown" else 0.85)


@pytest.mark.host
def test_every_pattern_of_every_architecture_is_of_some_model(shapes_of):
    """No rule is there by mistake or for show."""
    idle = Counter()
    for known in architecture.names():
        found = architecture.builtin(known)
        layers = [k.removesuffix(".weight") for name in ALL if ALL[name][0] == known for k in shapes_of(name)]
        for rule in (*found.keep, *found.eight_bits):
            used = {pattern for layer in layers for pattern in rule.matching(layer)}
            idle.update(f"{known}: {pattern}" for pattern in rule.patterns if pattern not in used)
    assert set(idle) == {  # in the files of these models, but not in ComfyUI's classes
        "chroma: nerf_final_layer*.linear", "gemma: **.lm_head", "llama: **.lm_head", "t5: decoder.**",
        "t5: encoder.embed_tokens", "t5: lm_head",
    }  # fmt: skip


@pytest.mark.host
@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_size_is_the_models(shapes_of, name):
    shapes = shapes_of(name)
    sizes = [2 * sum(map(math.prod, shapes.values()))]
    for generic in GENERIC:
        formats = {f"{layer}.weight": c.format for layer, c in resolved(name, generic).items() if c.format}
        kept = 2 * sum(math.prod(shape) for key, shape in shapes.items() if key not in formats)
        sizes.append(kept + sum(format.nbytes(*shapes[key]) for key, format in formats.items()))
    line = f"| {DOCUMENTED[name]} | {' | '.join(f'{size / 1e9:.2f}' for size in sizes)} |"
    assert line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.host
@pytest.mark.parametrize("known", architecture.names())
def test_where_a_reason_says_that_comfyui_reads_a_shape_it_does(shapes_of, known):
    models = [name for name in ALL if ALL[name][0] == known]
    read = {key.removesuffix(".weight") for name in models for key in host_detects(name, shapes_of(name))[1]}
    said = [rule for rule in architecture.builtin(known).keep if re.search("ComfyUI.*shape", rule.reason)]
    assert not [rule.reason for rule in said if not any(rule.matching(layer) for layer in read)]
    silent = [rule for rule in architecture.builtin(known).keep if rule not in said]
    assert not [rule.reason for rule in silent if any(rule.matching(layer) for layer in read)]


# ---- without a host

TINY = {key: tuple(shape) for key, shape in {
    "tok.weight": (40000, 64), "patch_in.weight": (512, 48), "patch_in.bias": (512,), "out_head.weight": (48, 512),
    **{f"trunk.{n}.{part}.weight": shape for n in range(4) for part, shape in {
        "attn.q_proj": (512, 512), "attn.out.0": (512, 512), "mlp.up": (2048, 512), "mlp.down": (512, 2044),
        "mlp.conv": (512, 512, 3), "adaLN_modulation.1": (3072, 512), "norm.linear": (1024, 512),
        "gate": (1, 512), "small": (64, 512), "pos_embed.proj": (512, 512),
    }.items()},
}.items()}  # fmt: skip


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_unknown_model_packs_only_what_repeats_and_says_what_it_kept():
    found = detect(TINY)
    layer_map = recipe.builtin("nvfp4").resolve(TINY)
    assert [n for n, choice in layer_map.items() if choice.format] == [
        f"trunk.{n}.{part}" for n in (1, 2, 3) for part in ("attn.q_proj", "attn.out.0", "mlp.up")
    ]
    assert layer_map.architecture == found.name == "unknown" and layer_map.problems == []
    assert layer_map.warnings == [found.warning] and found.warning == (
        "unknown architecture: safe defaults; kept 30 of 39 layers: 1 a table of tokens (tok); "
        "2 outside the numbered blocks (patch_in, out_head); "
        "3 first of its kind (trunk.0.attn.q_proj, trunk.0.attn.out.0, trunk.0.mlp.up); "
        "4 odd shape (trunk.0.mlp.down, trunk.1.mlp.down, trunk.2.mlp.down, ...); "
        "4 modulation (trunk.0.adaLN_modulation.1, trunk.1.adaLN_modulation.1, trunk.2.adaLN_modulation.1, ...); "
        "4 norm (trunk.0.norm.linear, trunk.1.norm.linear, trunk.2.norm.linear, ...); "
        "8 tiny (trunk.0.gate, trunk.0.small, trunk.1.gate, ...); "
        "4 embedder (trunk.0.pos_embed.proj, trunk.1.pos_embed.proj, trunk.2.pos_embed.proj, ...)"
    )


@pytest.mark.parametrize("name", [
    "lm_head", "model.embed_tokens", "shared", "transformer.wte", "final_layer.linear", "proj_out", "time_in.in_layer",
    "blocks.3.token_embedding.proj", "blocks.3.attn_norm.linear", "blocks.3.scale_shift_gate", "blocks.3.modX.1",
    "blocks.3.img_mod.lin", "blocks.3.adaln_proj", "blocks.3.ln_1.proj", "blocks.3.emb_layers.1",
    "blocks.3.to_gate_logits",
])  # fmt: skip
def test_names_that_an_unknown_model_keeps(name):
    blocks = [f"blocks.{n}.{name.partition('.3.')[2]}" for n in range(5)] if ".3." in name else [name]
    assert all(safe_defaults({f"{layer}.weight": (2048, 2048) for layer in blocks}).keeps(layer) for layer in blocks)


@pytest.mark.parametrize(
    "part", ["model.up", "attn.qkv", "mlp.fc1", "to_out.0", "w2", "img_mlp.0", "feed_forward.gate"]
)
def test_names_that_an_unknown_model_packs(part):
    found = safe_defaults({f"blocks.{n}.{part}.weight": (2048, 2048) for n in range(3)})
    assert [bool(found.keeps(f"blocks.{n}.{part}")) for n in range(3)] == [True, False, False]


def test_many_rows_make_no_table_of_a_block_linear():
    found = safe_defaults({f"blocks.{n}.up.weight": (65536, 4096) for n in range(3)} | {"tok.weight": (65536, 4096)})
    assert found.keeps("blocks.2.up") is None
    assert found.keeps("tok") == "a table of tokens: looked up by row"


def test_tiny_trained_model_is_a_z_image():
    shapes = Checkpoint(ROOT / "tests" / "tiny" / "tiny_zimage_bf16.safetensors").shapes()
    layer_map = recipe.builtin("nvfp4").resolve(shapes)
    assert layer_map.architecture == "z_image" and layer_map.counts()["nvfp4"] > 20


def test_four_bit_default_is_eased_and_an_eight_bit_default_is_not():
    flux = architecture.builtin("flux")
    formats = {
        default.label: {rule.format.label for rule in flux.rules(default) if rule.format}
        for default in (NVFP4(), MXFP8(), BF16())
    }
    assert formats == {"nvfp4": {"mxfp8"}, "mxfp8": set(), "bf16": set()}
    assert flux.eases("double_blocks.3.img_mod.lin") and not flux.eases("double_blocks.3.img_attn.qkv")
    assert flux.keeps("img_in") and flux.keeps("some.adapter") == "outside the model's blocks"
    assert flux.keeps("single_blocks.0.linear1") is None


def test_shapes_tell_two_models_with_the_same_keys_apart():
    keys = ("img_in.weight", "proj_out.weight", "transformer_blocks.0.img_mod.1.weight",
            "transformer_blocks.0.attn.add_k_proj.weight")  # fmt: skip
    names = [detect(dict.fromkeys(keys, (64, 64)) | {"txt_norm.weight": (size,)}).name for size in (3584, 2560)]
    assert names == ["qwen_image", "unknown"]  # the other is Mage-Flow


@pytest.mark.parametrize(("text", "words"), [
    ("keep = 3 4", "at line 1"),
    ("kept = 1", "unknown key 'kept'; known are name, title, detect, absent, blocks, shapes, keep, eight_bits"),
    ("", "nothing is kept; add"),
    ("name = 'auto'\nblocks = ['a']", "name is 'auto'; write a word"),
    ("name = 3\nblocks = ['a']", "name is 3"),
    ("title = 3\nblocks = ['a']", "title is 3; write a text"),
    ("blocks = 'a'", "blocks is 'a'; write a list of patterns"),
    ("blocks = ['a.{b']", "pattern 'a.{b' has a bad brace"),
    ("blocks = ['a.weight']", "pattern 'a.weight' names a tensor"),
    ("blocks = ['a']\ndetect = ['(a)']", r"pattern '\(a\)' has '\('"),
    ("blocks = ['a']\nabsent = ['a..b']", "has an empty segment"),
    ("blocks = ['a']\nshapes = 3", "shapes is not a table"),
    ("blocks = ['a']\n[shapes]\n'a.weight' = [-1]", r"shapes: a.weight is \[-1\]; write sizes"),
    ("keep = 3", r"keep is not a list of tables; write \[\[keep\]\] above each"),
    ("[[keep]]\nlayers = ['a']", "keep 1: no reason"),
    ("[[keep]]\nlayers = ['a']\nreason = 'r'\n[[keep]]\nreason = 'r'", r"keep 2: keep = \[\] names no layer"),
    ("[[eight_bits]]\nlayers = ['a']\nreason = 'r'\nmxfp8 = ['b']", "eight_bits 1: unknown key 'mxfp8'"),
    ("[[keep]]\nlayers = 'a'\nreason = 'r'", "keep 1: layers is 'a'; write a list"),
])  # fmt: skip
def test_a_mistake_in_a_file_is_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}.bad\.toml: .*{words}"):
        architecture.read(written(tmp_path / "bad.toml", text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.toml: cannot be read"):
        architecture.read(tmp_path / "gone.toml")


@pytest.mark.parametrize("name", architecture.names())
def test_files_are_named_after_what_they_describe(name):
    found = architecture.builtin(name)
    assert found.name == name and found.title and found.present and found.keep and found.blocks


def test_documentation_shows_the_files():
    assert architecture.table() in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
