//! One JSON value a frame on a stream: four bytes of length, big-endian, then the value.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Reads a frame of at most `max` bytes. `Ok(None)` when the other side closed between frames.
/// Not cancel-safe: a dropped call loses the place in the stream.
pub async fn read<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
    max: usize,
) -> io::Result<Option<T>> {
    let mut head = [0; 4];
    if from.read(&mut head[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..]).await?;
    let len = u32::from_be_bytes(head) as usize;
    let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    if len > max {
        return Err(bad(format!(
            "a frame of {len} bytes, at most {max} are allowed"
        )));
    }
    // Memory grows with what really comes, not with what the head says.
    let mut bytes = Vec::new();
    from.take(len as u64).read_to_end(&mut bytes).await?;
    if bytes.len() < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| bad(format!("not understood: {e}")))
}

/// A frame's bytes.
pub fn encode(value: &impl Serialize, max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, value)?;
    let len = bytes.len() - 4;
    if len > max {
        let why = format!("a frame of {len} bytes, at most {max} are allowed");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    bytes[..4].copy_from_slice(&(len as u32).to_be_bytes());
    Ok(bytes)
}

/// Writes a frame and flushes.
pub async fn write(
    to: &mut (impl AsyncWrite + Unpin),
    value: &impl Serialize,
    max: usize,
) -> io::Result<()> {
    to.write_all(&encode(value, max)?).await?;
    to.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_arrive_and_wrong_ones_are_errors() {
        let mut wire = encode(&"one", 100).unwrap();
        wire.extend(encode(&"two", 100).unwrap());
        let mut from = wire.as_slice();
        assert_eq!(
            read::<String>(&mut from, 100).await.unwrap().unwrap(),
            "one"
        );
        assert_eq!(
            read::<String>(&mut from, 100).await.unwrap().unwrap(),
            "two"
        );
        assert!(read::<String>(&mut from, 100).await.unwrap().is_none());
        assert!(read::<String>(&mut wire.as_slice(), 4).await.is_err());
        assert!(read::<String>(&mut &wire[..3], 100).await.is_err());
        assert!(read::<String>(&mut &wire[..7], 100).await.is_err());
        assert!(read::<u32>(&mut wire.as_slice(), 100).await.is_err());
        assert!(read::<u32>(&mut &[255u8; 64][..], 100).await.is_err());
        assert!(encode(&"too long", 5).is_err());
    }
}
