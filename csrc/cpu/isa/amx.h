// The tile registers: 8 tiles of up to 16 rows of 64 bytes.
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__)

namespace mii::cpu::MII_ISA {

struct TileRows {
  int rows[8];
};

// Configures the tiles of this thread and gives them back at the end: a live tile state makes context switches dearer.
class TileState {
 public:
  void set(const TileRows& wanted) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = static_cast<uint8_t>(wanted.rows[t]);
    }
    // gcc 12 believes that _tile_loadconfig reads eight bytes and drops the other stores without this.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileState() { _tile_release(); }
};

}  // namespace mii::cpu::MII_ISA

#endif
