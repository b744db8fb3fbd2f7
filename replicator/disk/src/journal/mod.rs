//! The standby's journal on disk: two segment files of chained, checksummed records.
//!
//! ```text
//! segment: 0     header copy 0 (512 bytes used)     generations alternate between the copies,
//!          4096  header copy 1                       the newer intact one counts
//!          8192  record, record, …                   to the first that does not continue the chain
//! ```
//! A record continues the chain when its checksum is right, its number is the next, and it names
//! the checksum of the record before it; a segment's header names the last checksum of the segment
//! before. So nothing left over from an earlier use of the file can be taken for a record, and
//! what replay finds is always a *prefix* of what was appended, whatever the disk did with the
//! order of writes.

pub mod record;
pub mod replay;
pub mod segment;
