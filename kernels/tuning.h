// Block and tile sizes of the kernels, with their reasons.
#pragma once

namespace mor {

// depth_attention without tensor cores, 128 threads: 16 threads down, each with kQueries / 16 query
// rows, by 8 across, each with kKeys / 8 keys. Shared memory must stay within 99 KiB, what sm_86
// and sm_89 allow (the backward of 256 head dimensions in float64, for gradcheck, does not), and
// the accumulators of a thread (kQueries / 16 * HEAD_DIM / 8 numbers, in the backward twice
// kKeys / 16 * HEAD_DIM / 8) at about 64 registers.
template <class Acc, int HEAD_DIM>
struct AttentionFmaTile {
  static constexpr int kBytes = HEAD_DIM * int(sizeof(Acc));  // of a row
  static constexpr int kForward = kBytes <= 512 && sizeof(Acc) == 4 ? 64 : kBytes <= 1024 ? 32 : 16;
  static constexpr int kBackward = kBytes <= 256 ? 64 : kBytes <= 512 ? 32 : 16;
};

// depth_attention on tensor cores: 4 warps with 16 of kRows rows each (grad_kv of more than 128
// head dimensions: twice as many, half the dimensions each, or the sums would not fit in
// registers); the other operand streams through, 64 rows at a time or, for shared memory is bounded as
// above, 32 of wide rows (fewer would not fill a warp's tiles; more were not compared, for want of a
// GPU), and the backward of 256 head dimensions has but one stage.
template <int HEAD_DIM>
struct AttentionMmaTile {
  static constexpr int kRows = 64;
  static constexpr int kForwardKeys = HEAD_DIM <= 128 ? 64 : 32;
  static constexpr int kStreamed = HEAD_DIM <= 64 ? 64 : 32;
  static constexpr int kStages = HEAD_DIM <= 128 ? 2 : 1;
  static constexpr int kGradKvWidth = HEAD_DIM <= 128 ? HEAD_DIM : 128;
  static constexpr int kGradKvThreads = 128 * HEAD_DIM / kGradKvWidth;
};

}  // namespace mor
