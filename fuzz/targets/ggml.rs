//! libFuzzer's entry to [`deltanet_fuzz::ggml`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltanet_fuzz::ggml::check(data));
