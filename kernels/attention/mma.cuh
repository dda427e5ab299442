// The instructions of the tensor-core kernels; with exp2_acc (depth_attention.cuh) the only inline
// PTX of mor. The SIMT harness runs its own version of each (tests/simt/harness/tensor_core.h).
#pragma once

#include "../common.cuh"

#if defined(MOR_SIMT)
#include "tensor_core.h"
#endif

namespace mor {

// d[16, 8] += a[16, 16] * b[16, 8] by one warp; T is __nv_bfloat16 or __half, sums are float32.
// Lane l holds, with g = l / 4 and t = l % 4: d rows g, g + 8, columns 2t, 2t + 1; a rows g, g + 8,
// columns 2t, 2t + 1, then those + 8; b rows 2t, 2t + 1 (b0), then those + 8 (b1), column g.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#if defined(MOR_SIMT)
  simt::mma_m16n8k16<T>(d, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory: lane l gives the 16-byte aligned address
// of row l % 8 of matrix l / 8 and gets elements (l / 4, 2 * (l % 4)) and its right neighbour of
// each (TRANSPOSED: and its lower neighbour in the transposed matrix).
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(MOR_SIMT)
  simt::ldmatrix_x4<TRANSPOSED>(r, row);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// Starts a copy of 16 aligned bytes to shared memory, of zeros if not valid.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
#if defined(MOR_SIMT)
  simt::async_copy16(shared, global, valid, simt::Site::here());
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(global), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if defined(MOR_SIMT)
  simt::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if defined(MOR_SIMT)
  simt::async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace mor
