"""Names that `vulture` takes for dead code and that are not: `make check` reads this file.

A name stands here only where something outside of `src/` and `examples/` calls it.
"""

# Read or called by a library: methods of callbacks and of the Trainer, attributes of their objects.
_.on_log
_.on_pre_optimizer_step
_.on_step_begin
_.on_step_end
_.on_train_end
_.on_prediction_step
_.on_save
_.on_epoch_begin
_.on_epoch_end
_.on_substep_end
_.compute_loss
_.floating_point_ops
_.get_batch_samples
_.get_eval_dataloader
_.get_train_dataloader
_.prediction_step
_.prediction_loss_only
_.ignore_keys
_.loss_is_scaled_for_ga
_.model_accepts_loss_kwargs
_._attn_implementation_internal
_._n_gpu
_.disabled
_.mixed_precision_policy
_.pad_token
_.padding_side
_.transformer_cls_names_to_wrap
_.use_cache

# For tests and for users' own tests.
_.assert_matches_single_process
_.cast_floats
_.forget_choices
_.not_loaded
_.parked_bytes
_.read_log
_.run_ranks

# For the type checker alone, and for the tables of keys and losses.
_.PreferenceName
_.StageName
_.arg
_.reference_kl

# Techniques of memory and classes of stages, which fields name in text, and names of tuple places.
KTOStage
RewardStage
PolicyStage
DistillStage
_.CHECKPOINTING
_.SAVED_ATTENTION
_.CHUNKS
_.ATTENTION_GROUPS
_.SAVED_MLP
_.OFFLOAD
_.LAST_LAYERS
_.LATE_PREFETCH
_.SEGMENTS
_.PLACEMENT
_.GRADIENTS
_.output_layer
_.first_layer
_.last_layer
_.after_attention

# The cost model's parts and the pool's counter, read by tests and benchmarks.
_.working_set
_.moments
_.offloaded_bytes
_.active_layer_parameters
_.real_heads

# Of torch's schedulers and transformers' Trainer: they read these.
_.base_lrs
_._last_lr
_._save_checkpoint
_.stateful_callbacks
_.eval_on_start
_.should_save_on_this_rank

# Callbacks that transformers' Trainer calls, and a rate that is read by its name.
_.on_evaluate
_.on_predict
_.seconds_per_step

# PyAV and tokenizers read these.
_.thread_type
_.pre_tokenizer

# Indexers of transformers call a cache.
_.update_index

# transformers and accelerate call it.
_.tie_weights
