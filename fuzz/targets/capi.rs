//! libFuzzer's entry to [`deltanet_fuzz::capi`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| deltanet_fuzz::capi::check(data));
