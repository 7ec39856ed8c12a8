//! libFuzzer's entry to [`deltanet_fuzz::safetensors`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltanet_fuzz::safetensors::check(data));
