//! Status codes and the error that carries one with its message.

use std::ffi::CStr;
use std::fmt;

/// What a call answers: `OK`, or the class of rule that an argument broke. `deltanet_last_error` has the words.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// A pointer that must not be null is null.
    NullPointer = 1,
    /// A pointer or a stride is not a multiple of its element's size.
    Misaligned = 2,
    /// `struct_size` is smaller than any released header's, or unknown fields of a newer header are in use.
    StructSize = 3,
    /// An enumeration has a value that this version does not know.
    UnknownValue = 4,
    /// A tensor has a dtype that its role does not allow.
    Dtype = 5,
    /// A tensor's `ne` contradicts the other tensors or the operator's rules.
    Shape = 6,
    /// A tensor's `ne` and `nb` reach outside the address space.
    Stride = 7,
    /// An output overlaps another tensor, or itself.
    Overlap = 8,
    /// A state row index is outside its pool, or two sequences meet in one row that is written.
    Row = 9,
    /// `cu_seqlens` does not start at 0, decreases, or ends past the last token.
    Sequences = 10,
    /// `ith` is not below `nth`, or a thread count is out of range.
    Threads = 11,
    /// The scratch or workspace is null or too small.
    Scratch = 12,
    /// The snapshot settings ask for more than the buffer holds, or contradict each other.
    Snapshots = 13,
    /// A floating-point setting is out of its range.
    Value = 14,
    /// A valid request that this build or machine cannot serve.
    Unsupported = 15,
    /// Memory or threads could not be had.
    OutOfMemory = 16,
    /// The CUDA driver reported an error.
    Cuda = 17,
    /// A defect in this library: a panic was caught at the boundary.
    Internal = 18,
}

impl Status {
    /// Every status, in the order of their numbers.
    pub const ALL: [Status; 19] = [
        Status::Ok,
        Status::NullPointer,
        Status::Misaligned,
        Status::StructSize,
        Status::UnknownValue,
        Status::Dtype,
        Status::Shape,
        Status::Stride,
        Status::Overlap,
        Status::Row,
        Status::Sequences,
        Status::Threads,
        Status::Scratch,
        Status::Snapshots,
        Status::Value,
        Status::Unsupported,
        Status::OutOfMemory,
        Status::Cuda,
        Status::Internal,
    ];

    /// The status as a C program spells it, without the prefix.
    pub fn name(self) -> &'static str {
        self.c_name().to_str().unwrap_or_default()
    }

    /// [`Status::name`] for C.
    pub(crate) fn c_name(self) -> &'static CStr {
        match self {
            Status::Ok => c"OK",
            Status::NullPointer => c"NULL_POINTER",
            Status::Misaligned => c"MISALIGNED",
            Status::StructSize => c"STRUCT_SIZE",
            Status::UnknownValue => c"UNKNOWN_VALUE",
            Status::Dtype => c"DTYPE",
            Status::Shape => c"SHAPE",
            Status::Stride => c"STRIDE",
            Status::Overlap => c"OVERLAP",
            Status::Row => c"ROW",
            Status::Sequences => c"SEQUENCES",
            Status::Threads => c"THREADS",
            Status::Scratch => c"SCRATCH",
            Status::Snapshots => c"SNAPSHOTS",
            Status::Value => c"VALUE",
            Status::Unsupported => c"UNSUPPORTED",
            Status::OutOfMemory => c"OUT_OF_MEMORY",
            Status::Cuda => c"CUDA",
            Status::Internal => c"INTERNAL",
        }
    }
}

/// A status other than `Ok`, and the sentence that names the argument, its value and the rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: Status,
    message: String,
}

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with its message.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        Error { status, message: message.into() }
    }

    /// An error whose message is put together here. Where memory is so short that the words do not fit, they are cut:
    /// reporting that must not abort the process.
    pub(crate) fn compose(status: Status, message: fmt::Arguments<'_>) -> Self {
        struct Words(String);
        impl fmt::Write for Words {
            fn write_str(&mut self, words: &str) -> fmt::Result {
                self.0.try_reserve(words.len()).map_err(|_| fmt::Error)?;
                self.0.push_str(words);
                Ok(())
            }
        }
        let mut words = Words(String::new());
        let _ = fmt::Write::write_fmt(&mut words, message);
        Error { status, message: words.0 }
    }

    /// The class of rule that was broken.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Names the argument, what it was and what it must be.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.name(), self.message)
    }
}

impl std::error::Error for Error {}

/// Returns early with an [`Error`] unless the rule holds.
macro_rules! ensure {
    ($rule:expr, $status:ident, $($message:tt)+) => {
        if !$rule {
            return Err($crate::error::Error::compose($crate::error::Status::$status, format_args!($($message)+)));
        }
    };
}
pub(crate) use ensure;
