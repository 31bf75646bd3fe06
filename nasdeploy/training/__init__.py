"""Training as functions: steps, schedules, distillation, batch-norm recalibration, evaluation."""
